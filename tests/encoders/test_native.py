"""The ViT of packed rows, by its laws; its parity with transformers is in tests/hf/test_qwen_vl.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.data.native import Native
from mllm_jax.encoders import native
from mllm_jax.nn import attention
from mllm_jax.types import Media
from tests.contracts import check_features, run

CASES = {"2": native.QWEN2_VIT.tiny(), "2.5": native.QWEN2_5_VIT.tiny(), "3": native.QWEN3_VIT.tiny()}
GRIDS = ((1, 4, 6), (2, 4, 4))          # an image and a video of two steps, in one row; then the image alone


def coords(grids) -> np.ndarray:
    return np.concatenate([Native().cut(np.zeros((2 * t, 8 * h, 8 * w, 3), np.uint8), 8)[1] for t, h, w in grids])


def media(grids, width: int, padding: int = 8, seed: int = 0) -> Media:
    """A row of these grids and one of the first alone."""
    sizes = [int(np.prod(g)) for g in grids]
    item = np.zeros((2, sum(sizes) + padding), np.int32)
    item[0, : sum(sizes)], item[1, : sizes[0]] = np.repeat(np.arange(1, len(grids) + 1), sizes), 1
    at = np.zeros((*item.shape, 3), np.int32)
    at[0, : sum(sizes)], at[1, : sizes[0]] = coords(grids), coords(grids[:1])
    values = np.random.default_rng(seed).standard_normal((*item.shape, width)).astype(np.float32)
    values[1, : sizes[0]] = values[0, : sizes[0]]
    return Media(values=jnp.asarray(values), coords=jnp.asarray(at), item=jnp.asarray(item), mask=jnp.asarray(item > 0), slot=jnp.zeros((2, 1), int))


@pytest.mark.parametrize("name", CASES)
def test_contract_and_what_patches_see(name):
    cfg = CASES[name]
    x = media(GRIDS, cfg.patch_dim)
    module = cfg.build(rngs=nnx.Rngs(0))
    y = check_features(module, x)
    assert y.tokens.shape == (*x.item.shape, cfg.width) and (y.deep is None) == (not cfg.deep)
    np.testing.assert_array_equal(y.mask, x.item > 0)
    # Wherever an image stands, and whatever stands beside it, its features are the same.
    np.testing.assert_allclose(y.tokens[1, :24], y.tokens[0, :24], atol=1e-5)
    # The second step of the video changes; nothing else sees that.
    other = run(module, replace(x, values=x.values.at[0, 40:56].add(1.0)))
    moved = np.abs(np.asarray(other.tokens - y.tokens)).max(-1)
    assert (moved[0, 40:56] > 1e-4).all() and moved[0, :40].max() == moved[1].max() == 0


def test_windows_are_squares_from_the_upper_left_corner():
    """A frame of 6 x 10 patches in windows of 4: three across, the last of two columns; two down, the last of two rows."""
    x = media(((1, 6, 10),), 1, padding=4)
    got, at = np.asarray(native.windows(x, 4))[0], np.asarray(x.coords)[0]
    groups = {tuple(sorted(map(tuple, at[:60][got[:60] == g, 1:].tolist()))) for g in set(got[:60].tolist())}
    want = {tuple((r, c) for r in range(a, min(a + 4, 6)) for c in range(b, min(b + 4, 10))) for a in (0, 4) for b in (0, 4, 8)}
    assert groups == want and not got[60:].any()
    assert len(set(got[:40]) & set(got[40:60])) == 0 and got[:40].max() < got[40:60].min()      # bands follow one another


def test_frames_are_counted_over_the_row():
    x = media(GRIDS, 1)
    assert np.asarray(native.frames(x))[0].tolist() == [1] * 24 + [2] * 16 + [3] * 16 + [0] * 8


def test_the_table_is_resampled_as_torch_does(torch):
    """Corners stay corners; a side of one patch reads the first row."""
    grids, table = ((1, 2, 6), (1, 8, 4), (2, 10, 14)), np.random.default_rng(0).standard_normal((25, 3)).astype(np.float32)
    x = media(grids, 1, padding=3)
    got, at = np.asarray(native.resampled(jnp.asarray(table), 5, x))[0], 0
    for t, h, w in grids:
        square = torch.tensor(table).reshape(1, 5, 5, 3).permute(0, 3, 1, 2)
        want = torch.nn.functional.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
        here = slice(at, at + t * h * w)
        places = np.asarray(x.coords)[0, here]
        np.testing.assert_allclose(got[here], want[places[:, 1], places[:, 2]], atol=1e-5)
        at += t * h * w
    line = replace(x, coords=jnp.zeros_like(x.coords).at[..., 2].set(jnp.arange(x.item.shape[1])), item=jnp.ones_like(x.item))
    np.testing.assert_allclose(native.resampled(jnp.asarray(table), 5, line)[0, [0, -1]], table[[0, 4]], atol=1e-5)


def test_long_rows_are_read_in_blocks_with_the_same_result(monkeypatch):
    """Windows and whole frames of three blocks, of which many are left out."""
    cfg = CASES["2.5"]
    x = media(((1, 16, 20), (1, 12, 24)), cfg.patch_dim)
    module = cfg.build(rngs=nnx.Rngs(0))
    whole = jax.jit(lambda m, x: m(x).tokens)(module, x)
    monkeypatch.setattr(attention, "LONG", 16)
    blocks = jax.jit(lambda m, x: m(x).tokens)(module, x)
    real = np.asarray(x.item) > 0
    # Sums in another order.
    np.testing.assert_allclose(np.asarray(blocks)[real], np.asarray(whole)[real], atol=2e-5)


def test_a_row_of_8192_patches_needs_no_matrix_of_all_pairs():
    """Forward and backward: 90 MiB measured, where the scores of one layer alone would take 512."""
    cfg, n = CASES["2.5"], 8_192
    module = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    x = Media(values=jax.ShapeDtypeStruct((1, n, cfg.patch_dim), jnp.float32), coords=i32(1, n, 3), item=i32(1, n),
              mask=jax.ShapeDtypeStruct((1, n), bool), slot=i32(1, 1))
    program = jax.jit(jax.grad(lambda m, x: jnp.sum(m(x).tokens))).lower(module, x).compile()
    patches = n * cfg.patch_dim * 4
    assert program.memory_analysis().temp_size_in_bytes < cfg.heads * n * n * 4 / 4 + patches
