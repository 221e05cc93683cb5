"""LLaVA-OneVision: one image in tiles, several images, videos, each in a row of its own and all in one."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllm_jax.cli import main
from mllm_jax.config import ConfigError
from mllm_jax.config import load as load_recipe
from mllm_jax.data.layouts import AnyRes, Pooled
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.hf import llava_onevision
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.family import differences
from mllm_jax.hf.load import load
from mllm_jax.types import Blob, Example, Part, Turn
from tests.data.test_video import clip
from tests.hf import whole
from tests.hf.test_load import LAYOUTS, rewritten
from tests.hf.test_parity import check_pixels
from tests.hf.whole import finished

# Five patches a side leave a margin of two pixels, and pool to three tokens that are no means of squares.
SIZE, PATCH, GRID, CAP = 42, 8, 5, 4
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH, "vision_use_head": False}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 512}


def png(width: int, height: int) -> Blob:
    coarse = Image.fromarray(np.random.default_rng(width).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(file, "png")
    return Blob(kind="image", data=file.getvalue())


def example(*parts: str | Blob) -> Example:
    media = tuple(p for p in parts if isinstance(p, Blob))
    asked = tuple(Part(text=p) if isinstance(p, str) else Part(kind=p.kind, media=media.index(p)) for p in parts)
    return Example(id=str(len(media)), turns=(Turn(role="user", parts=asked), Turn(role="assistant", parts=(Part(text="the moon"),))), media=media)


VIDEO = Blob(kind="video", data=clip(total=4))
EXAMPLES = (
    example(png(70, 41), "wide?"), example(png(140, 150), "shrunk to four tiles?"), example("the same? ", png(33, 90), " or ", png(50, 50)),
    example("who is there?"), example(VIDEO, png(40, 64), "which?"),
)  # fmt: skip


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    import transformers as hf

    words = load_tokenizer("bytes", media=("image", "video"))
    pinpoints = [[r * SIZE, c * SIZE] for r in range(1, 4) for c in range(1, 4)]
    pixels = hf.LlavaOnevisionImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=pinpoints, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    processor = whole.without_films(hf.LlavaOnevisionProcessor)(
        pixels, words, num_image_tokens=GRID**2, vision_feature_select_strategy="full", vision_aspect_ratio=f"anyres_max_{CAP}")
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER), text_config=hf.Qwen2Config(**LM, vocab_size=len(words)), image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{CAP}", image_token_index=processor.image_token_id, video_token_index=processor.video_token_id)
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    return whole.FilmCase(finished(model), processor, "plain", EXAMPLES, tmp_path_factory.mktemp("onevision") / "one", LAYOUTS)


def test_pixels_and_ids_are_those_of_the_processor(case, torch):
    batch = case.batch([[e] for e in EXAMPLES])
    inputs = case.theirs(batch.tokens.shape[1])
    np.testing.assert_array_equal(batch.segments, inputs["attention_mask"])
    real = np.asarray(batch.segments) > 0
    np.testing.assert_array_equal(np.asarray(batch.tokens)[real], inputs["input_ids"].numpy()[real])
    media, tower = batch.media["image"], case.cfg.inputs["image"]
    values = np.asarray(media.values)[np.asarray(media.mask)]
    frames = inputs["pixel_values_videos"].flatten(0, 1)                # which stand before the image of their row, that is the last
    images = whole.tiles_of({"pixel_values": inputs["pixel_values"]})
    last = int((inputs["pixel_values"][-1] != 0).flatten(1).any(1).sum())
    both = torch.cat([images[:-last], frames, images[-last:]])[..., : GRID * PATCH, : GRID * PATCH]
    assert inputs["batch_num_images"].tolist() == [1, 1, 2, 1] and len(both) == len(values) == 3 + 10 + 2 + 4 + 3
    check_pixels(values, both, tower.encoder)
    means = np.asarray(media.mix)
    counted = [int(((mix > 0).sum(-1) > 1).sum()) for mix in means]
    assert counted[0] == counted[2] == counted[3] == 0 and counted[1] > 50 and counted[4] == 4 * 9 - 4 * 1     # the middle one is a copy


def test_states_logits_loss_and_gradients(case, torch):
    whole.check_outputs(case, torch)


def test_greedy_answers_of_32_tokens(case):
    whole.check_greedy(case)


def test_a_question_about_a_video_on_the_command_line(case, tmp_path, capsys):
    (tmp_path / "film.mp4").write_bytes(VIDEO.data)
    (tmp_path / "half.mp4").write_bytes(VIDEO.data[:300])
    argv = ["generate", str(case.folder), "--prompt", "which?", "--template", "plain", "--max-new-tokens", "4", "--video"]
    assert main([*argv, str(tmp_path / "film.mp4")]) == 0 and capsys.readouterr().err == ""
    assert main([*argv, str(tmp_path / "half.mp4")]) == 1
    line = capsys.readouterr().err
    assert "(decode): the video cannot be read" in line and line.count("\n") == 1
    assert main([*argv, str(tmp_path / "none.mp4")]) == 2 and "there is no file" in capsys.readouterr().err


def test_the_view_of_each_kind(case):
    tower = case.cfg.inputs["image"]
    assert tower.layout == AnyRes(cap=CAP) and tower.also["video"].layout == Pooled() and tower.also["video"].view.frames == 32
    assert tower.kinds["images"].view.fill == (127, 127, 127) and tower.kinds["images"].layout == tower.layout


def test_a_published_configuration_is_the_model_of_the_recipe():
    """What config.json of the 0.5B folder says; frames are as a question wants them there, and one a second in training."""
    text = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151_936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    half = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3}
    got, want = llava_onevision.config({"model_type": "llava_onevision", "text_config": text}, half), load_recipe(
        "resolution/llava_onevision:size=0.5b").model
    assert set(differences(got, want)) == {f"inputs.image.also.video.view.{field}" for field in ("fps", "pick")}


def test_there_and_back(case, torch, tmp_path):
    import transformers as hf

    def opened(folder):
        """The processor part by part: what opens all of them at once wants torchvision."""
        kept = json.loads((folder / "processor_config.json").read_text())
        assert kept["video_processor"]["num_frames"] == 32 and kept["video_processor"]["size"] == {"height": SIZE, "width": SIZE}
        names = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio", "image_token", "video_token")
        return type(case.processor)(
            hf.LlavaOnevisionImageProcessorPil.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder), **{k: kept[k] for k in names})

    whole.check_round_trip(case, torch, tmp_path, opened)


@pytest.mark.parametrize(
    ("where", "change", "match"),
    [
        ("", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio='anyres' is not supported; anyres_max_1 to anyres_max_9 are"),
        ("vision_config", {"model_type": "clip_vision_model"}, "keeps the class token"),
        ("", {"image_grid_pinpoints": [[42, 63]]}, "llava_onevision: image_grid_pinpoints is"),
    ],
)
def test_what_is_not_supported_is_refused(case, tmp_path, where, change, match):
    config = lambda c: c | ({where: c[where] | change} if where else change)
    with pytest.raises(ConfigError, match=match):
        load(rewritten(case.folder, tmp_path / "x", config=config))


def test_a_model_without_videos_is_no_onevision(case, tmp_path):
    tower = case.cfg.inputs["image"]
    cfg = replace(case.cfg, inputs={"image": replace(tower, also={"images": tower.also["images"]})})
    with pytest.raises(ConfigError, match="cannot express inputs.image.also.video"):
        export(case.params, cfg, tmp_path / "x", tokenizer=case.tokenizer)
    assert describe(case.folder)[0].model_type == "llava_onevision"
