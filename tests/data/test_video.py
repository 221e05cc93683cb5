"""Videos: the frames that are wanted, through the tower of the images."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.batch import collate, decode_items
from mllm_jax.data.errors import BadExample
from mllm_jax.data.layouts import AnyRes, Pooled, Spans
from mllm_jax.data.loader import Loader
from mllm_jax.data.native import Native
from mllm_jax.data.pack import pack, row_spec
from mllm_jax.data.tiles import OneTile, Tiles
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.recipe import Data
from mllm_jax.types import Blob, Example, Grid, Part, Turn

CLIPS = Path(os.environ.get("MLLM_JAX_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "webvid" / "videos"
GOLDEN = Path(__file__).parents[1] / "golden" / "video.npz"
TOKENIZER = load_tokenizer("bytes", media=("image", "video"), tokens=("<|vision_start|>", "<|vision_end|>"))
VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=4, depth=1)
TOWER = TowerConfig(
    view=Tiles(size=32), encoder=VIT, connector=MLPConfig(), layout=AnyRes(),
    also={"video": Also(view=Frames(view=Square(size=32), frames=6), layout=Pooled())},
)  # fmt: skip


def clip(total: int = 100, rate: int = 10, height: int = 48, width: int = 64, format: str = "mp4") -> bytes:
    """A video whose frame i has the tens of i as red and the units as green, 25 levels apart; a key frame every twelve."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = width, height, "yuv420p", 12, 2_000_000
        for i in range(total):
            colour = np.array([25 * (i // 10 % 10), 25 * (i % 10), 128], np.uint8)
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (height, width, 3)).copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


CLIP = clip()


def numbers(values: np.ndarray, n: int) -> list[int]:
    return [10 * round(red / 25) + round(green / 25) for red, green, _ in values.reshape(n, -1, 3).mean(axis=1)]


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(out, "PNG")
    return out.getvalue()


def example(*media: Blob, id: str = "e") -> Example:
    parts = (*(Part(kind=blob.kind, media=i) for i, blob in enumerate(media)), Part(text="?"))
    return Example(id=id, turns=(Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text="yes"),))), media=media)


def go(example: Example, tower: TowerConfig):
    return encode(example, template="plain", tokenizer=TOKENIZER, towers={"image": tower})


VIDEO, IMAGE = Blob(kind="video", data=CLIP), Blob(kind="image", data=png())


@pytest.mark.parametrize(("pick", "expected"), [
    ("start", [0, 25, 50, 75]), ("middle", [12, 37, 62, 87]), ("ends", [0, 33, 66, 99]), ("nearest", [0, 33, 66, 99])])
def test_the_frames_that_are_wanted_are_decoded_counted_or_jumped_to(pick, expected):
    view = Frames(view=Square(size=32), frames=4, pick=pick)
    for exact in (True, False):
        values, coords = view(CLIP, 8, exact=exact)
        assert numbers(values, 4) == expected
        assert coords.shape == (4 * 16, 3) and coords[:, 0].tolist() == np.repeat(np.arange(4), 16).tolist()
    plan = view.look(VIDEO, 8)
    assert (plan.tiles, plan.frames, plan.grid, plan.size) == (4, 4, (1, 4, 4), (48, 64))
    assert plan.seconds == tuple(i / 10 for i in expected) and plan.every == 2.5


def test_frames_for_each_second():
    view = Frames(view=Square(size=32), frames=6, fps=0.5, least=3, pick="start")
    assert view.look(VIDEO, 8).frames == 5                                      # of 10 seconds
    assert view.look(Blob(kind="video", data=clip(20)), 8).frames == 3          # of 2 seconds, and at least three
    assert view.look(Blob(kind="video", data=clip(200)), 8).frames == 6         # of 20 seconds, and at most six
    assert view.look(Blob(kind="video", data=clip(2)), 8).frames == 2           # all there are


def test_a_frame_of_every_second_or_an_even_spread_of_the_most():
    """The official rule (LLaVA-VL/LLaVA-NeXT, llava/utils.py, process_video_with_pyav)."""
    def official(total, rate, fps, most):
        wanted = list(range(0, total, round(rate / fps)))
        return np.linspace(0, total - 1, most, dtype=int).tolist() if len(wanted) > most else wanted

    for total, rate, fps, most in ((100, 10.0, 1.0, 32), (100, 10.0, 1.0, 6), (101, 29.97, 1.0, 32), (1, 24.0, 1.0, 32), (7200, 23.976, 2.0, 32)):
        view = Frames(view=Square(size=32), frames=most, fps=fps, pick="every")
        assert view._wanted(total, rate).tolist() == official(total, rate, fps, most)
    view = Frames(view=Square(size=32), frames=32, fps=1.0, pick="every")
    assert view.look(VIDEO, 8).seconds == tuple(range(10)) and numbers(view(CLIP, 8, exact=False)[0], 10) == list(range(0, 100, 10))
    assert view.plan(48, 64, 8).frames == 32
    for pick in ("every", "inside"):
        with pytest.raises(ConfigError, match=f"pick='{pick}' takes a frame so many times a second; give fps"):
            Frames(view=Square(size=32), frames=4, pick=pick)


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real videos in {CLIPS} (set MLLM_JAX_REAL_DATA)")
def test_frames_of_real_videos_are_those_that_transformers_reads():
    read = pytest.importorskip("transformers.video_utils").read_video_pyav
    for path in sorted(CLIPS.glob("*.mp4"))[:2]:
        view = Frames(view=Square(size=64), frames=5, pick="start")
        plan = view.look(Blob(kind="video", path=str(path)), 8)
        theirs, meta = read(str(path), lambda metadata, **_: np.arange(5) * metadata.total_num_frames // 5)
        np.testing.assert_allclose(plan.seconds, np.asarray(meta.frames_indices) / meta.fps)
        values, _ = view(path.read_bytes(), 8, exact=True)
        own = np.concatenate([Square(size=64).exactly(Image.fromarray(frame))[None] for frame in theirs])
        np.testing.assert_array_equal(values.reshape(5, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(5, 64, 64, 3), own)
        # Jumping finds the same frames; only the cheaper filter differs.
        assert np.abs(view(path.read_bytes(), 8, exact=False)[0].astype(int) - values).mean() < 6


def test_a_video_and_an_image_share_a_tower_and_a_row():
    spec = row_spec(96, {"image": 12}, {"image": TOWER}, 0)
    assert row_spec(96, {}, {"image": TOWER}, 0).media["image"].items == 6
    s = go(example(VIDEO, IMAGE), TOWER)
    assert [(i.modality, i.room, i.num_tokens) for i in s.items] == [("image", 6, 96), ("image", 3, 48)]
    kinds = s.kinds[s.kinds > 0].tolist()
    assert kinds == [2] * (6 * 4 + 1) + [1] * (16 + 4 * 9)
    (row,) = pack([s], spec)
    batch = collate([row], [decode_items(row.media, {"image": TOWER}, exact=True)], spec)
    media = batch.media["image"]
    assert numbers(media.values[0, :6], 6) == [0, 19, 39, 59, 79, 99] and media.mask[0].tolist() == [True] * 9 + [False] * 3
    here = media.slot[0] >= 0
    # Each token of a frame is the mean of a square of four; the newline is the mark behind 12 tiles of 16 tokens.
    assert media.taps[0, here][0].tolist() == [0, 1, 4, 5] and media.mix[0, here][0].tolist() == [0.25] * 4
    assert media.slot[0, here][24] == 12 * 16 and media.slot[0, here][25] == 96


def test_pooled_frames_are_those_of_onevision():
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision").LlavaOnevisionModel
    fake = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=384, patch_size=14)))
    features = np.random.default_rng(0).normal(size=(3, 729, 2)).astype(np.float32)
    theirs = model.apply_pooling(fake, torch.tensor(features)).numpy().reshape(-1, 2)
    cut = Frames(view=Square(size=384), frames=3).plan(100, 100, 14)
    (run,) = Pooled()(cut, (1, 27, 27))
    assert len(run.slots) == 3 * 196 + 1 and run.slots[-1] == -2
    ours = np.einsum("nkd,nk->nd", features.reshape(-1, 2)[run.taps[:-1]], run.mix[:-1])
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    counts = [len(Pooled(newline=where)(cut, (1, 27, 27))[0].slots) for where in ("row", "frame", "end", "")]
    assert counts == [3 * 14 * 15, 3 * 197, 3 * 196 + 1, 3 * 196]
    with pytest.raises(ConfigError, match="newline='rows' is no place"):
        Pooled(newline="rows")


@config
class Merge:
    """An encoder that makes a token of 2 x 2 patches, as far as the host knows it."""

    patch: int = 8
    patch_dim: int = 2 * 8 * 8 * 3
    width: int = 8

    def num_tokens(self, grid: Grid) -> Grid:
        return grid[0], grid[1] // 2, grid[2] // 2


NATIVE = Native(min_pixels=256, max_pixels=4096)
QWEN = TowerConfig(
    view=NATIVE, encoder=Merge(), connector=MLPConfig(), place="grid",
    layout=Spans(before="<|vision_start|>", after="<|vision_end|>"),
    also={"video": Also(view=Frames(view=NATIVE, frames=8, fps=0.5, least=4, pick="start"),
                        layout=Spans(before="<|vision_start|>", after="<|vision_end|>", rate=2.0))},
)  # fmt: skip


def test_a_packed_video_is_one_grid_with_time():
    s = go(example(VIDEO, IMAGE), QWEN)
    assert [item.cut.grid for item in s.items] == [(2, 6, 8), (1, 4, 8)]          # four frames of 48 x 64 pixels, two in a patch
    assert s.items[0].cut.seconds == (1.25, 6.25) and s.items[0].cut.every == 5.0
    spec = row_spec(96, {"image": 200}, {"image": QWEN}, 0)
    (row,) = pack([s], spec)
    media = collate([row], [decode_items(row.media, {"image": QWEN}, exact=True)], spec).media["image"]
    assert numbers(media.values[0, :96].reshape(2, 48, 2, -1).swapaxes(1, 2), 4) == [0, 25, 50, 75]
    assert media.coords[0, :96].max(0).tolist() == [1, 5, 7] and media.item[0].tolist() == [1] * 96 + [2] * 32 + [0] * 72
    assert media.slot[media.slot >= 0].tolist() == list(range(32))


def test_patches_of_frames_are_those_of_transformers():
    golden = np.load(GOLDEN)
    values, coords = NATIVE.cut(golden["frames"], 8)
    assert tuple(golden["grid"]) == tuple(coords.max(0) + 1) == (3, 4, 6)
    own = values.reshape(-1, 2, 8, 8, 3).transpose(0, 4, 1, 2, 3).reshape(len(values), -1)
    np.testing.assert_array_equal(own, golden["qwen"])


@pytest.mark.parametrize(("name", "view", "most", "part"), [
    ("onevision", Square(size=28), 1, 0.01), ("smolvlm", OneTile(size=28, longest=56), 2, 0.03)])
def test_frames_are_those_of_transformers_but_for_a_level(name, view, most, part):
    """There torchvision resizes, SmolVLM twice; it rounds otherwise than Pillow, which resizes the images of the same models."""
    golden = np.load(GOLDEN)
    own = np.stack([view.exactly(Image.fromarray(frame)) for frame in golden["frames"]])
    apart = np.abs(own.astype(int) - golden[name])
    assert apart.max() <= most and (apart > 0).mean() < part


def test_patches_of_resized_frames_are_those_of_transformers_but_for_one_level():
    golden, size = np.load(GOLDEN), (30, 45)
    frames = [Image.fromarray(frame[: size[0], : size[1]]) for frame in golden["frames"]]
    values, coords = NATIVE.cut(np.stack([NATIVE.bring(f, size, NATIVE.resized(*size, 8), exact=True) for f in frames]), 8)
    assert tuple(golden["grid_odd"]) == tuple(coords.max(0) + 1) == (3, 4, 6)
    apart = np.abs(values.reshape(-1, 2, 8, 8, 3).transpose(0, 4, 1, 2, 3).reshape(len(values), -1).astype(int) - golden["qwen_odd"])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_time_of_positions_runs_in_seconds_as_in_qwen2_5_vl():
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLModel
    s = go(example(VIDEO, IMAGE), QWEN)
    fake = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)))
    fake.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(fake, *a, **k)
    # Behind a video transformers goes on from its rows and columns alone, not from its time: here up to its last token.
    end = int(np.flatnonzero(s.kinds == 2)[-1]) + 1
    theirs, _ = model.get_rope_index(
        fake, torch.tensor(s.tokens[None, :end]), mm_token_type_ids=torch.tensor(s.kinds[None, :end]),
        video_grid_thw=torch.tensor([s.items[0].cut.grid]), second_per_grid_ts=torch.tensor([s.items[0].cut.every]))
    np.testing.assert_array_equal(s.positions[:end], theirs[:, 0].T.numpy())
    assert s.positions[end].tolist() == [s.positions[:end].max() + 1] * 3
    plain = go(example(VIDEO), replace(QWEN, also={"video": replace(QWEN.also["video"], layout=QWEN.layout)}))
    start = int(np.flatnonzero(plain.kinds)[0])
    assert (plain.positions[plain.kinds == 2] - start).max(0).tolist() == [1, 2, 3]


def test_each_step_of_time_may_be_announced_as_in_qwen3_vl():
    processor = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    layout = Spans(tile="<{seconds:.1f} seconds><|vision_start|>", close="<|vision_end|>")
    s = go(example(VIDEO), replace(QWEN, also={"video": replace(QWEN.also["video"], layout=layout)}))
    first, second = processor._calculate_timestamps(None, np.array([0, 25, 50, 75]), 10.0, 2)
    seen = TOKENIZER.decode(s.tokens).replace("<video>" * 12, "*")
    assert seen.startswith(f"<s><{first:.1f} seconds><|vision_start|>*<|vision_end|><{second:.1f} seconds><|vision_start|>*<|vision_end|>?")
    # Each step is a grid of its own: its time does not count from the step before.
    starts = [int(i) for i in np.flatnonzero((s.kinds == 2) & (np.roll(s.kinds, 1) == 0))]
    assert [(s.positions[i : i + 12] - s.positions[i]).max(0).tolist() for i in starts] == [[0, 2, 3], [0, 2, 3]]


def test_frames_share_a_budget_of_pixels():
    view = Frames(view=NATIVE, frames=64, budget=16_384)
    # 64 frames of 256 pixels each, but never below the smallest image and a twentieth.
    assert view.plan(480, 640, 8).grid == (32, 2, 2) and Frames(view=NATIVE, frames=4, budget=16_384).plan(480, 640, 8).grid == (2, 6, 8)
    assert view.room(8) >= 32 * 4                       # 32 steps of time, of two frames each
    with pytest.raises(ConfigError, match="cannot keep to budget=9"):
        Frames(view=Square(size=32), frames=4, budget=9)
    with pytest.raises(ConfigError, match="pick='end' is no way to choose frames; nearest: ends"):
        Frames(view=Square(size=32), frames=4, pick="end")
    with pytest.raises(ConfigError, match="a frame of a video must be one tile"):
        Frames(view=Tiles(size=32), frames=4).plan(480, 640, 8)


def test_a_frame_is_changed_as_all_others_of_its_video():
    s = go(example(Blob(kind="video", data=CLIP)), TOWER)
    (row,) = pack([s], row_spec(96, {"image": 12}, {"image": TOWER}, 0))
    dim = lambda image, rng: (image * rng.uniform(0, 1)).astype(np.uint8)
    plain, changed = (decode_items(row.media, {"image": TOWER}, exact=True, augment=a)[0][0].reshape(6, -1).mean(1) for a in ((), (dim,)))
    factors = (changed / np.maximum(plain, 1))[1:]
    assert np.ptp(factors) < 0.03                       # u8 rounds a mean of 40 by one


@pytest.mark.parametrize(("data", "words"), [
    (CLIP[: len(CLIP) // 3], "cannot be read"), (b"no video at all", "cannot be read"), (png(), "cannot be read"),
    (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", "cannot be read")])
def test_what_is_no_video_is_a_bad_example(data, words):
    with pytest.raises(BadExample, match=f"record 'e' is bad .decode.*{words}"):
        go(example(Blob(kind="video", data=data)), TOWER)


def test_a_video_that_stops_early_is_a_bad_example():
    data = clip(format="avi")                           # its header comes first
    s = go(example(Blob(kind="video", data=data)), TOWER)
    view = TOWER.also["video"].view
    assert numbers(view(data, 8, exact=True)[0], 6) == [0, 19, 39, 59, 79, 99]
    for exact in (True, False):
        with pytest.raises(BadExample, match="stops being readable after . of 6 frames|cannot be read"):
            view(data[: len(data) // 2], 8, exact=exact)
    assert s.items[0].cut.frames == 6


def test_a_video_that_breaks_behind_its_header_is_skipped_and_counted(tmp_path):
    whole = clip(format="avi")
    records = []
    for i in range(4):
        (tmp_path / f"{i}.avi").write_bytes(whole[: len(whole) // 2] if i == 2 else whole)
        turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": f"film{i}", "video": f"{i}.avi", "conversations": turns})
    (tmp_path / "films.json").write_text(json.dumps(records))
    data = Data(sources={"llava:films.json": 1.0}, batch_size=2, seq_len=64, items={"image": 12}, on_bad_example="skip")
    with iter(Loader(data, {"image": TOWER}, TOKENIZER, rows=2, root=tmp_path)) as batches:
        seen = [next(batches) for _ in range(4)]
    ids = {id.rsplit("/", 1)[1] for rows in seen for row in rows.info.ids for id in row}
    assert ids == {"film0", "film1", "film3"}
    assert {reason for _, reason in seen[-1].info.dropped} == {"decode"} and sum(seen[-1].info.dropped.values()) >= 2
    shown = seen[0].batch.media["image"]
    assert numbers(shown.values[0, :6], 6) == [0, 19, 39, 59, 79, 99] and (shown.slot[0] >= 0).sum() == 2 * (6 * 4 + 1)
    with iter(Loader(replace(data, on_bad_example="raise"), {"image": TOWER}, TOKENIZER, rows=2, root=tmp_path)) as batches:
        with pytest.raises(BadExample, match="film2' is bad .decode.*(stops being readable after|cannot be read)"):
            [next(batches) for _ in range(4)]


def test_a_missing_file_and_a_kind_without_a_tower_say_so():
    with pytest.raises(BadExample, match="missing_file.*/no/such.mp4"):
        go(example(Blob(kind="video", path="/no/such.mp4")), TOWER)
    with pytest.raises(ConfigError, match="the data has videos and the model takes image; choose another source"):
        go(example(VIDEO), replace(TOWER, also={}))
