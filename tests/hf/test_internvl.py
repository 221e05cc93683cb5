"""InternVL: images in tiles, videos, none, each in a row of its own and all in one; the tower of 300M, and that of 6B."""

import json
from functools import cache

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.layouts import INTERNVL, INTERNVL_VIDEO
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.hf.load import load
from tests.hf import whole
from tests.hf.test_load import in_memory, rewritten
from tests.hf.test_onevision import VIDEO, example, png
from tests.hf.test_tiles import LM, PATCH, SIZE, TOWER
from tests.hf.whole import finished

NAMES = ("300m", "6b")
TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
EXAMPLES = (example("the same? ", png(70, 41), " or ", png(50, 50)), example(VIDEO, png(33, 90), "which?"), example("who is there?"))


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    import transformers as hf

    made = load_tokenizer("bytes", media=(), tokens=(*TOKENS.values(), "<|im_start|>", "<|im_end|>"))
    words = type(made)(tokenizer_object=made.backend_tokenizer, extra_special_tokens=TOKENS, pad_token="<pad>", eos_token="</s>")
    image = words.convert_tokens_to_ids("<IMG_CONTEXT>")

    @cache
    def make(name: str) -> whole.FilmCase:
        """Before Qwen2; or with norms of queries and keys, before Qwen3 with a tied head, and read one layer earlier."""
        pixels = hf.GotOcr2ImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, min_patches=1, max_patches=4, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        processor = whole.without_films(hf.InternVLProcessor)(pixels, words, image_seq_length=4)
        large = name == "6b"
        own = {"norm_type": "rms_norm", "use_qk_norm": True} if large else {"attention_bias": True, "use_mean_pooling": False}
        lm = hf.Qwen3Config(**LM, head_dim=12, vocab_size=len(words)) if large else hf.Qwen2Config(**LM, vocab_size=len(words))
        config = hf.InternVLConfig(
            vision_config=TOWER | own | {"image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}, text_config=lm, image_token_id=image,
            image_seq_length=4, tie_word_embeddings=large, vision_feature_layer=-2 if large else -1)
        model = finished(hf.InternVLForConditionalGeneration(config))
        return whole.FilmCase(model, processor, "chatml", EXAMPLES, tmp_path_factory.mktemp("internvl") / name, {"in memory": in_memory})

    return make


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_ids_are_those_of_the_processor(case, name):
    it = case(name)
    whole.check_inputs(it)
    tower = it.cfg.inputs["image"]
    assert tower.layout == INTERNVL and tower.also["video"].layout == INTERNVL_VIDEO and tower.also["video"].view.frames == 32


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(case, torch, name):
    whole.check_outputs(case(name), torch)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(case, name):
    whole.check_greedy(case(name))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(case, torch, tmp_path, name):
    import transformers as hf

    def opened(folder):
        """The processor part by part: what opens all of them at once wants torchvision."""
        kept = json.loads((folder / "processor_config.json").read_text())
        assert kept["video_processor"]["num_frames"] == 32 and kept["video_processor"]["size"] == {"height": SIZE, "width": SIZE}
        return type(case(name).processor)(
            hf.AutoImageProcessor.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder), image_seq_length=kept["image_seq_length"])

    whole.check_round_trip(case(name), torch, tmp_path, opened)


def test_a_head_is_tied_unless_the_whole_says_no(case, tmp_path):
    without = lambda c: {k: v for k, v in c.items() if k != "tie_word_embeddings"}
    assert load(rewritten(case("6b").folder, tmp_path / "x", config=without))[0].decoder.head == "tied"
    assert case("300m").cfg.decoder.head == "own"


@pytest.mark.parametrize(
    ("where", "change", "match"),
    [
        ("", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' are not supported"),
        ("", {"downsample_ratio": 0.75}, "downsample_ratio=0.75 is not supported; 1/2, 1/4 and so on are"),
        ("vision_config", {"image_size": [64, 64]}, "cuts tiles of {'height': 32, 'width': 32} pixels; those of the tower have 64"),
        ("vision_config", {"image_size": [64, 32]}, r"image_size=\[64, 32\] of the tower is no square"),
        ("vision_config", {"use_qk_norm": True}, "norm_type='layer_norm' of eps 1e-06 is not supported with use_qk_norm=True"),
        ("vision_config", {"use_mask_token": True}, "a tower with use_mask_token"),
    ],
)
def test_what_is_not_supported_is_refused(case, tmp_path, where, change, match):
    config = lambda c: c | ({where: c[where] | change} if where else change)
    with pytest.raises(ConfigError, match=match):
        load(rewritten(case("300m").folder, tmp_path / "x", config=config))
