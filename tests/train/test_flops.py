"""FLOPs against hand counts, against the matmuls of the traced step, and against XLA's own analysis."""

from dataclasses import replace
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.connectors.resampler import PerceiverConfig
from mllm_jax.data.native import Native
from mllm_jax.data.views import Square
from mllm_jax.decoders.expert import ExpertLayer
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.native import NativeViTConfig
from mllm_jax.encoders.vit import EVA_G14_224, ViTConfig
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.gated import Gated, open_flamingo
from mllm_jax.nn.lora import LoRA
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.nn.position import Rope
from mllm_jax.objectives import InfoNCE, Matching, NextToken
from mllm_jax.sharding import Layout, use
from mllm_jax.train.flops import Counts, flops_by_part, step_flops
from mllm_jax.types import Batch, Media

ROWS, SEQ = 2, 32
VIT = ViTConfig(width=48, depth=3, heads=3, mlp=96, patch=8, grid=4, layer=-2)
LLM = DecoderConfig(vocab=100, width=64, depth=2, heads=4, kv_heads=2, mlp=80, causal=False)
MLLM = MLLMConfig(inputs={"image": TowerConfig(view=Square(size=32), encoder=VIT, connector=MLPConfig())}, decoder=LLM)
SIGLIP = replace(VIT, class_token=False, pool="map", layer=-1)
DUAL = DualEncoderConfig(
    inputs={"image": TowerConfig(view=Square(size=32), encoder=VIT, route="pool")},
    text=replace(LLM, head="none"), dim=24)
MAP = replace(DUAL, inputs={"image": replace(DUAL.inputs["image"], encoder=SIGLIP)})
SPARSE = replace(LLM, depth=3, cycle=(Layer(mlp=MoEConfig(experts=8, top_k=3)), Layer()))
READS = Gated(width=VIT.width, block=replace(open_flamingo(LLM.width), heads=2, head_dim=12, mlp=96))
FLAMINGO = MLLMConfig(
    inputs={"image": replace(MLLM.inputs["image"], connector=PerceiverConfig(grid=4, queries=5, depth=1, heads=2, head_dim=8), route="memory")},
    decoder=replace(LLM, depth=3, vocab=98, added=2, cycle=(Layer(), Layer(reads=READS))))
FULL = Counts(rows=ROWS, tokens=ROWS * SEQ, squares=ROWS * SEQ**2, trained=ROWS * SEQ, items={"image": ROWS})


def batch(patch_dim: int) -> Batch:
    """Rows without padding whose every position is trained, so that a dense program does only what counts."""
    i = np.arange(SEQ, dtype=np.int32)
    row = lambda x: np.tile(x, (ROWS, 1))
    image = Media(values=np.ones((ROWS, 1, 16, patch_dim), np.uint8), coords=np.zeros((ROWS, 1, 16, 3), np.int32),
                  mask=np.ones((ROWS, 1), bool), slot=row(np.where(i < 16, i, -1)))
    ones = np.ones((ROWS, SEQ), np.int32)
    return Batch(tokens=row(i), targets=row(i), weights=ones.astype(np.float32), segments=ones, kinds=ones,
                 positions=np.tile(i[None, :, None], (ROWS, 1, 3)), media={"image": image})


def program(model, glob):
    """(value_and_grad function of the trained parameters, trained, frozen): shapes only."""
    made = {}

    def build():
        made["graph"], params = split(model.build(rngs=nnx.Rngs(0)))
        return params

    params = jax.eval_shape(build)
    trained = {k: v for k, v in params.items() if fnmatch(k, glob)}
    frozen = {k: v for k, v in params.items() if k not in trained}
    objective = InfoNCE() if isinstance(model, DualEncoderConfig) else NextToken()
    rows = batch(VIT.patch_dim)

    def loss(trained, frozen):
        return objective.score(merge(made["graph"], trained | frozen)(rows), rows)["loss"].value

    return jax.value_and_grad(loss), trained, frozen


def matmul_flops(jaxpr, times: int = 1) -> int:
    """Operations of all dot products of a traced program; a scan's body counts for each of its turns."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in contract], dtype=int)
            total += 2 * int(depth * np.prod(eqn.outvars[0].aval.shape, dtype=int)) * times
        if eqn.primitive.name == "ragged_dot_general":              # each row meets the matrix of one group
            left, right = (v.aval.shape for v in eqn.invars[:2])
            (out,) = (v.aval.shape for v in eqn.outvars)
            total += 2 * left[0] * int(np.prod(out[1:] if len(out) == 3 else right[1:], dtype=int)) * times
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value if hasattr(value, "eqns") else None)
            if inner is not None and hasattr(inner, "eqns"):
                total += matmul_flops(inner, times * turns)
    return total


CASES = {
    "all of an MLLM": (MLLM, "*"),
    "only the connector": (MLLM, "inputs/image/connector/*"),
    "only the second connector layer": (MLLM, "inputs/image/connector/layers/1/*"),
    "only the encoder": (MLLM, "inputs/image/encoder/*"),
    "only the decoder": (MLLM, "decoder/*"),
    "only the output matrix": (MLLM, "decoder/head"),
    "tied embedding": (replace(MLLM, decoder=replace(LLM, head="tied")), "decoder/*"),
    "gated and plain": (replace(MLLM, decoder=replace(LLM, gated=False)), "*"),
    "layers that take turns": (replace(MLLM, decoder=replace(LLM, depth=5, cycle=(Layer(), Layer(rope=Rope(theta=100.0))))), "*"),
    "experts": (replace(MLLM, decoder=SPARSE), "*"),
    "only the experts": (replace(MLLM, decoder=SPARSE), "decoder/blocks/0/mlp/*"),
    "read from memory": (FLAMINGO, "*"),
    "only the readers": (FLAMINGO, "decoder/blocks/*/reads/*"),
    "only what is read": (FLAMINGO, "inputs/image/connector/*"),
    "a head with a bias": (replace(MLLM, decoder=replace(LLM, norms="parallel", head="biased")), "*"),
    "adapters": (LoRA(model=MLLM, rank=4, alpha=8, targets=("decoder/*",)), "*/lora/*"),
    "a dual encoder": (DUAL, "*"),
    "attention pooling": (MAP, "*"),
    "locked image tower": (DUAL, "text/*"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_the_traced_step(name):
    model, glob = CASES[name]
    with use(Layout()):
        step, trained, frozen = program(model, glob)
        traced = matmul_flops(jax.make_jaxpr(step)(trained, frozen).jaxpr)
    if isinstance(model, DualEncoderConfig):        # similarities are computed anew for their gradients, which is no work of the model
        traced -= 2 * ROWS * ROWS * model.dim
    assert step_flops(model, trained, FULL) == traced


def test_packed_patches_by_hand():
    """Of two images of 16 and 4 patches every patch counts once, and with those of its own image, or of its window of 4."""
    vit = NativeViTConfig(width=48, depth=3, heads=3, mlp=96, patch=8)
    model = lambda encoder: replace(MLLM, inputs={"image": TowerConfig(view=Native(), encoder=encoder, connector=MergeConfig())})
    work = lambda encoder: flops_by_part(model(encoder), set(), Counts(items={"image": 20}, pairs={"image": 16**2 + 4**2}))
    weights = 2 * 8 * 8 * 3 * 48 + 3 * (4 * 48 * 48 + 2 * 48 * 96)
    parts = work(vit)
    assert parts["inputs/image/encoder"] == 2 * 20 * weights + 4 * 48 * 3 * (16**2 + 4**2)
    assert parts["inputs/image/connector"] == 2 * 5 * (192 * 192 + 192 * 64)
    near = work(replace(vit, window=2, full=(2,)))["inputs/image/encoder"]
    assert near == 2 * 20 * weights + 4 * 48 * (16**2 + 4**2 + 2 * 20 * 4)


def test_the_count_of_a_bridge_is_about_that_of_the_traced_step():
    """The program also looks at pairs of queries and text that do not see one another."""
    encoder = replace(EVA_G14_224, width=48, depth=3, heads=3, mlp=96, patch=8, grid=4)
    former = QFormerConfig(tokens=17, queries=8, width=128, depth=4, heads=2, mlp=256, words=Words(vocab=100))
    tower = TowerConfig(view=Square(size=32), encoder=encoder, connector=former, route="pool")
    model = BridgeConfig(inputs={"image": tower}, dim=24)
    rows, made = replace(batch(VIT.patch_dim), draws=np.zeros(ROWS, np.uint32)), {}

    def build():
        made["graph"], params = split(model.build(rngs=nnx.Rngs(0)))
        return params

    def loss(trained, frozen):
        out = merge(made["graph"], trained | frozen)(rows)
        return sum(o.score(out, rows)["loss"].value for o in (InfoNCE(), Matching(), NextToken()))

    params = jax.eval_shape(build)
    for glob in ("*", "inputs/image/connector/*"):
        trained = {k: v for k, v in params.items() if fnmatch(k, glob)}
        with use(Layout()):
            step = jax.make_jaxpr(jax.grad(loss))(trained, {k: v for k, v in params.items() if k not in trained})
        assert step_flops(model, trained, FULL) == pytest.approx(matmul_flops(step.jaxpr), rel=0.05)


def test_xla_agrees_where_matmuls_dominate():
    wide = replace(LLM, width=256, heads=4, kv_heads=None, mlp=1024, vocab=2048)
    vit = replace(VIT, width=256, heads=4, mlp=1024)
    model = MLLMConfig(inputs={"image": replace(MLLM.inputs["image"], encoder=vit)}, decoder=wide)
    with use(Layout(unroll=8)):                                     # XLA counts the body of a loop once
        step, trained, frozen = program(model, "*")
        cost = jax.jit(step).lower(trained, frozen).compile().cost_analysis()["flops"]
    # XLA also counts norms, softmax and activations, and the resized table of positions: some per cent here.
    assert step_flops(model, trained, FULL) == pytest.approx(cost, rel=0.06)


def test_hand_count_of_a_frozen_and_a_trained_layer():
    llm = DecoderConfig(vocab=10, width=4, depth=1, heads=1, mlp=8)
    model = MLLMConfig(inputs={}, decoder=llm)
    counts = Counts(rows=1, tokens=5, squares=9 + 4, trained=2)             # examples of 3 and 2 tokens
    weights = 4 * 4 * 4 + 3 * 4 * 8                                         # attention and gated MLP
    pairs = 3 * 4 / 2 + 2 * 3 / 2
    all_of_it = {"decoder/embedding/table", "decoder/head", *(
        f"decoder/blocks/0/{x}/kernel" for x in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"))}
    assert step_flops(model, all_of_it, counts) == 6 * weights * 5 + 12 * 4 * pairs + 6 * 4 * 10 * 2
    assert step_flops(model, {"decoder/head"}, counts) == 2 * weights * 5 + 4 * 4 * pairs + 4 * 4 * 10 * 2
    below = {"decoder/embedding/table"}
    assert step_flops(model, below, counts) == 4 * weights * 5 + 12 * 4 * pairs + 4 * 4 * 10 * 2


def test_layers_with_a_window_see_no_more_pairs_than_it():
    llm = DecoderConfig(vocab=10, width=4, depth=5, heads=1, mlp=8, cycle=(Layer(window=3), Layer(window=3), Layer()))
    model = MLLMConfig(inputs={}, decoder=llm)
    two = Counts(rows=2, tokens=12, squares=2 * 6**2, trained=0)            # two examples of 6: 1 + 2 + 3 * 4 = 15 pairs, or 21
    weights = 5 * (4 * 4 * 4 + 3 * 4 * 8)
    assert step_flops(model, set(), two) == 2 * weights * 12 + 4 * 4 * 2 * (4 * 15 + 21)
    assert step_flops(model, set(), Counts(tokens=6, squares=18)) == 2 * weights * 6 + 4 * 4 * 5 * 2 * 6        # 3 fit into it
    whole = step_flops(model, {"decoder/blocks/2/mlp/up/kernel"}, two)
    assert whole - step_flops(model, set(), two) == 2 * 4 * 8 * 12 + 2 * weights * 12 + 2 * 4 * 4 * 2 * (4 * 15 + 21)


def test_a_position_goes_through_one_of_two_sets_of_weights():
    """The image has 16 of 40 positions; where its weights alone train, text has no gradient of weights."""
    model = replace(MLLM, decoder=replace(LLM, cycle=(ExpertLayer(),)))
    counts = Counts(rows=1, tokens=40, squares=1600, items={"image": 1})
    assert step_flops(model, set(), counts) == step_flops(MLLM, set(), counts)
    of = lambda trained: flops_by_part(model, {f"decoder/blocks/0/{trained}/kernel"}, counts)["decoder"]
    assert of("mlp/up") - of("expert/mlp/up") == 2 * 64 * 80 * LLM.depth * (24 - 16)


def test_padding_and_missing_images_cost_nothing():
    few = Counts(rows=1, tokens=10, squares=100, trained=3, items={"image": 1})
    assert flops_by_part(MLLM, {"decoder/head"}, replace(few, items={}))["inputs/image/encoder"] == 0
    twice = Counts(rows=2, tokens=20, squares=200, trained=6, items={"image": 2})
    assert step_flops(MLLM, {"decoder/head"}, twice) == 2 * step_flops(MLLM, {"decoder/head"}, few)


def test_nested_sets_of_tokens_are_read_one_by_one():
    """Rows of 100 positions with an image of 16 tokens: a set of 4 leaves 88 positions, and the causal half of their squares."""
    nested = replace(MLLM, inputs={"image": replace(MLLM.inputs["image"], connector=NestedConfig(depth=2, grid=4, windows=(1, 2)))})
    counts = Counts(rows=2, tokens=200, squares=2 * 100**2, trained=50, items={"image": 2})
    less = Counts(rows=2, tokens=176, squares=2 * 88**2, trained=50)
    text = MLLMConfig(inputs={}, decoder=MLLM.decoder)
    both = sum(step_flops(text, (), replace(c, items={})) for c in (counts, less))
    assert flops_by_part(nested, (), counts)["decoder"] == pytest.approx(both, rel=1e-12)


def test_an_unknown_part_is_an_error():
    with pytest.raises(KeyError):
        step_flops(jnp, set(), FULL)
