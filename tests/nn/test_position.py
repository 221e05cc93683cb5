import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn.position import LinearScaling, Llama3Scaling, Rope, interpolate


@pytest.mark.parametrize(("n", "side"), [(4, 7), (16, 24), (7, 3), (5, 5)])
def test_interpolation_is_that_of_torch(torch, n, side):
    table = np.random.default_rng(0).normal(size=(n * n, 6)).astype(np.float32)
    square = torch.tensor(table).reshape(1, n, n, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    # Two products of sums of 16 terms of order 1, in another order.
    np.testing.assert_allclose(interpolate(jnp.asarray(table), side), want.permute(0, 2, 3, 1).reshape(side * side, 6), atol=1e-5)


SCALINGS = {
    "default": (None, {}),
    "linear": (LinearScaling(factor=4.0), {"factor": 4.0}),
    "llama3": (Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=64),
               {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotation_is_that_of_transformers(torch, kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling, options = SCALINGS[kind]
    parameters = {"rope_type": kind, "rope_theta": 500.0, **options}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=parameters)
    q = torch.randn(2, 2, 9, 32, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0, 1, 2, 3, 50, 99, 100, 300, 500], [7, 6, 5, 4, 3, 2, 1, 0, 0]])
    cos, sin = LlamaRotaryEmbedding(config)(q, at)
    want, _ = apply_rotary_pos_emb(q, q, cos, sin)
    positions = jnp.stack([jnp.asarray(at.numpy())] * 3, -1)
    got = Rope(theta=500.0, scaling=scaling)(positions, 32)(jnp.asarray(q.permute(0, 2, 1, 3).numpy()))
    # Angles up to 500 radians in float32: an error of 500 * 2^-24 each.
    np.testing.assert_allclose(got, want.permute(0, 2, 1, 3), atol=2e-4)
    # Of llama3, some frequencies are stretched, some are not and some are in between.
    freqs, plain = Rope(theta=500.0, scaling=scaling).frequencies(32)[0], Rope(theta=500.0).frequencies(32)[0]
    ratios = len({round(float(r), 6) for r in plain / freqs})
    assert {"default": ratios == 1, "linear": ratios == 1, "llama3": ratios > 3}[kind]


def test_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    at = lambda n: Rope()(jnp.full((1, 1, 3), n), 16)
    score = lambda i, j: float(jnp.sum(at(i)(q) * at(j)(k)))
    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)


def test_sections_turn_with_their_axis():
    """With all three positions equal M-RoPE is RoPE; an axis turns its own frequencies alone."""
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    same = jnp.stack([jnp.arange(5)[None]] * 3, -1)
    np.testing.assert_array_equal(Rope(sections=(2, 3, 3))(same, 16)(x), Rope()(same, 16)(x))
    row = same.at[..., 1].add(3)
    changed = np.asarray(Rope(sections=(2, 3, 3))(row, 16)(x) != Rope()(same, 16)(x)).any((0, 1, 2))
    np.testing.assert_array_equal(changed, [False] * 2 + [True] * 3 + [False] * 5 + [True] * 3 + [False] * 3)
    with pytest.raises(ValueError, match="must add up to half of what turns of a head, 8"):
        Rope(sections=(2, 3, 4)).frequencies(16)
