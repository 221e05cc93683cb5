"""describe: shapes, sizes and work of published systems, without building them."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_jax.commands.describe import SIZES, Planned, batch_of, describe, number, short, table
from mllm_jax.config import ConfigError, load, recipe_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return "\n".join(describe("projector/llava_15", load("projector/llava_15"), "instruct"))


def test_the_line_has_every_shape(page):
    stage = load("projector/llava_15").stages["instruct"]
    b, s, i = stage.data.batch_size, stage.data.seq_len, stage.data.items["image"]
    shapes = ["u8[576 588]", f"i32[{b} {s}]", f"f[{b} {s} 4096]", f"f[{b} {576 * i} 1024]", f"f[{b} {576 * i} 4096]"]
    at = [page.index(shape) for shape in shapes]
    assert at == sorted(at)                             # in the order in which they come about
    assert "576 tokens for each image" in page and "23 of 24 layers run" in page


def test_sizes_are_those_published(page):
    assert "7.06B parameters, stages: align, instruct" in page
    row = {r.split()[0]: r.split()[1:] for r in page.splitlines() if len(r.split()) == 4}
    assert row["inputs/image/encoder"] == ["303.5M", "-", "-"]
    assert row["inputs/image/connector"] == ["21.0M", "21.0M", "21.0M"]
    assert row["decoder"] == ["6.74B", "-", "6.74B"]


def test_work_is_6_operations_per_trained_weight_and_position_and_attention(page):
    p = Planned(load("projector/llava_15"), "instruct")
    n, images = p.rows * p.seq, p.rows * p.items["image"]
    decoder = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 4096 * p.model.decoder.vocab
    attention = 12 * 32 * 4096 * n * (p.seq + 1) / 2
    vit = 588 * 1024 * 576 + 23 * (12 * 1024**2 * 577 + 2 * 1024 * 577**2)
    connector = 576 * (1024 * 4096 * 2 + 4096 * 4096 * 3)               # the first layer passes no gradient to the frozen ViT
    assert p.flops == 6 * decoder * n + attention + 2 * vit * images + 2 * connector * images


def test_adam_keeps_two_numbers_for_each_trained_one_and_none_for_frozen_ones():
    p = Planned(load("projector/llava_15"), "align")
    assert p.state_bytes == pytest.approx(8 * p.trained_size, abs=64) and p.trained_size == 20_979_712


def test_files_are_there_and_as_long_as_said(page):
    listed = re.findall(r"^ +(\d+)  (\S+\.py)$", page, re.M)
    assert listed[0][1] == "configs/projector/llava_15.py"
    order = [next(i for i, (_, f) in enumerate(listed) if f.endswith(x)) for x in (
        "data/views.py", "encoders/vit.py", "connectors/mlp.py", "decoders/transformer.py", "objectives/tokens.py", "train/step.py")]
    assert order == sorted(order)
    for lines, file in listed:
        assert len((ROOT / file).read_text().splitlines()) == int(lines)


def test_experts_are_counted_whole_and_as_a_token_uses_them():
    """Of StableLM 2 1.6B, 12 layers have 3 more copies of 3 matrices; a token uses one more than in the dense model."""
    page = "\n".join(describe("experts/moe_llava", load("experts/moe_llava"), "experts"))
    dense = Planned(load("experts/moe_llava"), "instruct").total
    matrices, router = 12 * 3 * 2048 * 5632, 12 * 2048 * 4
    p = Planned(load("experts/moe_llava"), "experts")
    assert p.total == dense + 3 * matrices + router and p.active == dense + matrices + router
    assert "3.20B parameters, of which a token uses 2.37B" in page and "12 layers have 4 experts, 2 for a token" in page
    assert "mllm_jax/nn/moe.py" in page and "mllm_jax/nn/experts.py" in page


def test_pairs_are_described_too():
    page = "\n".join(describe("contrastive/clip", load("contrastive/clip")))
    assert "427.6M parameters" in page and "f[32768 768]" in page and "every other row is a negative" in page


def test_a_batch_fits_the_model_of_every_stage():
    recipe = load("first/digits")
    for name in recipe.stages:
        p = Planned(recipe, name)
        assert batch_of(p).tokens.shape == (p.rows, p.seq)


# Of every image, or by the sizes that the page shows: what the papers say, or the processors of transformers.
TOKENS = {
    "projector/llava": 256, "projector/llava_15": 576, "projector/paligemma": 4096, "projector/gemma3": 256, "projector/honeybee": 144,
    "projector/mobilevlm": 144, "projector/mobilevlm_v2": 144, "resolution/m3": 576, "resampler/blip2": 32, "resampler/instructblip": 32,
    "resampler/qwen_vl": 256, "experts/moe_llava": 576, "experts/mm1": 5 * 144, "experts/cogvlm": 1225 + 2,
    "resolution/llava_next": {"1000x500": 1752, "640x480": 2340, "300x900": 2376, "800x800": 2928, "100x80": 576 + 20 * 25},
    "resolution/qwen2_vl": {"100x80": 12, "640x480": 391, "800x800": 841, "1000x500": 648, "300x900": 352},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TOKENS if name in recipe_names()])
def test_tokens_of_an_image_are_the_published_ones(name):
    page, wanted = "\n".join(describe(name, load(name))), TOKENS[name]
    found = by_size_of(page) if isinstance(wanted, dict) else int(re.search(r"; (\d+) tokens for each image", page)[1])
    assert found == wanted


def test_tokens_of_onevision_are_those_that_its_processor_asks_for():
    module = pytest.importorskip("transformers.models.llava_onevision.processing_llava_onevision")
    processor = object.__new__(module.LlavaOnevisionProcessor)
    vars(processor).update(num_image_tokens=729, vision_aspect_ratio="anyres_max_9", image_processor=SimpleNamespace(
        image_grid_pinpoints=[[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]))
    page = "\n".join(describe("resolution/llava_onevision", load("resolution/llava_onevision")))
    sizes = {f"{w}x{h}": processor._get_number_of_features(h, w, 384, 384) for w, h in SIZES}
    assert by_size_of(page) == sizes and sizes["800x800"] == 729 + 81 * 82
    assert "730 tokens for each image of several; 6273 tokens for each video" in page and 6273 == 32 * 14 * 14 + 1


def by_size_of(page: str) -> dict[str, int]:
    """{width x height: tokens} of the page."""
    header, counts = (line.split() for line in page.partition("Tokens of an image of so many pixels\n\n")[2].splitlines()[:2])
    return dict(zip(header, map(int, counts[1:]), strict=True))


def test_an_unknown_stage_is_named():
    with pytest.raises(ConfigError, match="nearest: align"):
        list(describe("x", load("projector/llava_15"), "aling"))


def test_13_billion_parameters_are_not_allocated():
    """They would be 53 GB; a process that imports JAX and makes none of them has half a GB."""
    code = ("import resource, sys; from mllm_jax.cli import main; code = main(['describe', 'projector/llava_15:size=13b']); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 3e9); sys.exit(code)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "13.35B" in out and out.endswith("True\n")


@pytest.mark.parametrize(("n", "text"), [(712_345, "712,345"), (20_979_712, "21.0M"), (7.06e9, "7.06B")])
def test_numbers(n, text):
    assert number(n) == text


def test_tables_align():
    assert list(table([("a", "1"), ("bbb", "22")], right=(1,))) == ["a     1", "bbb  22"]


@pytest.mark.parametrize(("x", "text"), [(950, "950"), (999.7, "1k"), (12_300, "12.3k"), (7.06e9, "7.06G")])
def test_short_numbers(x, text):
    assert short(x) == text
