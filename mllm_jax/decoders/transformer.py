"""The decoder: one transformer whose options cover the language models and text towers of the cookbook."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.nn import stack, visibility
from mllm_jax.nn.attention import LayerCache
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.param import Embedding, LayerNorm, RMSNorm, lookup, normal, param
from mllm_jax.nn.position import Llama3Scaling, Rope
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import compute_dtype, constrain
from mllm_jax.types import Batch, Mean, struct


@config
class DecoderConfig(BlockConfig):
    vocab: int
    depth: int
    rope: Rope | None = Rope()          # None: positions are learned
    positions: int | None = None        # size of the learned table
    causal: bool = True                 # False: a position sees all of its segment (text tower of SigLIP)
    head: str = "own"                   # what makes logits: its "own" matrix, the "tied" embedding, or "none"
    embed_scale: float = 1.0            # factor on the embeddings (Gemma: the root of the width)

    def build(self, *, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)

    def tiny(self) -> "DecoderConfig":
        rope = self.rope and replace(self.rope, sections=self.rope.sections and (2, 1, 1))
        return replace(self, vocab=264, width=32, depth=2, heads=4, mlp=64, kv_heads=2 if self.kv_heads else None,
                       head_dim=None, rope=rope, positions=self.positions and 320)


LLAMA = DecoderConfig(vocab=32_000, width=4096, depth=32, heads=32, mlp=11_008, norm=RMSNorm(eps=1e-5))
VICUNA_7B, VICUNA_13B = LLAMA, replace(LLAMA, width=5120, depth=40, heads=40, mlp=13_824)
LLAMA_3_1_8B = replace(
    LLAMA, vocab=128_256, kv_heads=8, mlp=14_336, rope=Rope(theta=5e5, scaling=Llama3Scaling()))
MISTRAL_7B = replace(LLAMA, kv_heads=8, mlp=14_336)
QWEN2_7B = DecoderConfig(
    vocab=152_064, width=3584, depth=28, heads=28, kv_heads=4, mlp=18_944, qkv_bias=True, rope=Rope(theta=1e6))
QWEN3_8B = DecoderConfig(
    vocab=151_936, width=4096, depth=36, heads=32, kv_heads=8, head_dim=128, mlp=12_288, qk_norm=True, rope=Rope(theta=1e6))
CLIP_TEXT_L = DecoderConfig(
    vocab=49_408, width=768, depth=12, heads=12, mlp=3072, gated=False, activation="quick_gelu", norm=LayerNorm(),
    qkv_bias=True, out_bias=True, mlp_bias=True, rope=None, positions=77, head="none")
CLIP_TEXT_B = replace(CLIP_TEXT_L, width=512, heads=8, mlp=2048)
SIGLIP_TEXT_B = replace(
    CLIP_TEXT_L, vocab=32_000, mlp=3072, activation="gelu_tanh", norm=LayerNorm(eps=1e-6), positions=64, causal=False)
SIGLIP_TEXT_SO400M = replace(SIGLIP_TEXT_B, width=1152, depth=27, heads=16, mlp=4304)


@struct
class Cache:
    """What a decoder remembers of a row: keys and values of all layers, and who may see them."""

    k: jax.Array                        # f[l b t g k]
    v: jax.Array                        # f[l b t g k]
    segments: jax.Array                 # i32[b t], 0 where nothing is written yet
    order: jax.Array                    # i32[b t]
    index: jax.Array                    # i32[]: where the next token goes


class Decoder(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = Embedding(cfg.vocab, cfg.width, rngs=rngs)
        self.position = param(rngs, (cfg.positions, cfg.width), "position embed", normal(0.01)) if cfg.rope is None else None
        self.blocks = stack.make([lambda r: Block(cfg, rngs=r)], cfg.depth, rngs=rngs)
        self.norm = cfg.norm.build(cfg.width, rngs=rngs)
        self.head = param(rngs, (cfg.width, cfg.vocab), "embed vocab", normal(0.02)) if cfg.head == "own" else None

    @property
    def unembed(self) -> jax.Array | None:
        """f32[d v]: hidden @ unembed are the logits."""
        if self.cfg.head == "none":
            return None
        matrix = self.embedding.table[...].T if self.head is None else self.head[...]
        # Gathered here, once, and not in every chunk of the loss.
        return constrain(matrix, "embed_act vocab")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[b s] -> f[b s d]."""
        return self.embedding(tokens) * jnp.asarray(self.cfg.embed_scale, compute_dtype())

    def __call__(self, x: jax.Array, batch: Batch, cache: Cache | None = None) -> tuple[jax.Array, dict[str, Mean], Cache | None]:
        """Embeddings f[b s d] -> (hidden states f[b s d], auxiliary losses, the cache with these positions in it)."""
        cfg = self.cfg
        head_dim = cfg.head_dim or cfg.width // cfg.heads
        rotation = None if cfg.rope is None else cfg.rope(batch.positions, head_dim)
        if self.position is not None:
            x = x + lookup(self.position[...], batch.positions[..., 0], "position").astype(x.dtype)
        sees = visibility.of_batch(batch, causal=cfg.causal)
        if cache is not None:
            cache, sees = remember(cache, sees)

        def step(carry: tuple, block: Block, i: jax.Array) -> tuple:
            x, kv = carry
            kv = kv and LayerCache(k=kv[0], v=kv[1], layer=i, index=cache.index)
            x, kv = block(constrain(x, "batch seq embed_act"), sees, rotation=rotation, cache=kv)
            return x, kv and (kv.k, kv.v)

        x, kv = stack.run(self.blocks, step, (x, cache and (cache.k, cache.v)), depth=cfg.depth)
        if cache is not None:
            cache = replace(cache, k=kv[0], v=kv[1], index=cache.index + x.shape[1])
        return self.norm(x), {}, cache

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows of at most so many positions."""
        cfg = self.cfg
        kv = (cfg.depth, rows, length, cfg.kv_heads or cfg.heads, cfg.head_dim or cfg.width // cfg.heads)
        none = jnp.zeros((rows, length), jnp.int32)
        return Cache(k=jnp.zeros(kv, compute_dtype()), v=jnp.zeros(kv, compute_dtype()), segments=none, order=none,
                     index=jnp.zeros((), jnp.int32))


def remember(cache: Cache, new: Visibility) -> tuple[Cache, Visibility]:
    """The cache with the new positions written at its index, and what those see of it.

    Causal order is the place in the cache; an order given in blocks must not pass it.
    """
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x, (0, cache.index))
    order = new.order + cache.index
    cache = replace(cache, segments=put(cache.segments, new.segments), order=put(cache.order, order))
    return cache, Visibility(segments=new.segments, order=order, key_segments=cache.segments, key_order=cache.order)
