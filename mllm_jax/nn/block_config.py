"""What a transformer layer is, as a value; `ViTConfig` and `DecoderConfig` are this and more."""

from mllm_jax.config import config
from mllm_jax.nn.param import LayerNorm, Norm, RMSNorm


@config
class BlockConfig:
    width: int
    heads: int
    mlp: int                            # hidden width of the feed-forward layer
    kv_heads: int | None = None         # heads of keys and values; None: as many as queries
    head_dim: int | None = None         # None: width / heads
    gated: bool = True                  # act(gate x) * up x instead of act(up x)
    activation: str = "silu"            # a name of nn/mlp.py
    norm: LayerNorm | RMSNorm = RMSNorm()
    qkv_bias: bool = False
    key_bias: bool = True               # that of keys too; without a rotation softmax does not see it, and EVA and Whisper have none
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool | str = False         # queries and keys are normalized before the rotation: True, each head; "width", all heads as one
    query_scale: float | None = None    # factor on the scores; None: head_dim ** -0.5
    norms: str = "before"               # where they stand: see nn/block.py
    layer_scale: float | None = None    # what attention and MLP give is scaled by learned vectors, which begin so (arXiv:2103.17239)


__all__ = ["BlockConfig", "Norm"]
