"""Families whose images are cut into tiles: LLaVA-NeXT."""

from functools import cache

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.hf.load import load
from tests.hf import whole
from tests.hf.test_load import LAYOUTS, rewritten

SIZE, PATCH = 32, 8
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 512}
NAMES = ("llava_next",)


def examples():
    """A wide and a tall image, one image, and none."""
    from tests.hf.tiny_gemma import talk

    return talk(2, "the same?", "no"), talk(1, "what is it?", "the moon"), talk(0, "who is there?", "me")


def llava_next():
    import transformers as hf

    words = load_tokenizer("bytes")
    pinpoints = [[r * SIZE, c * SIZE] for r, c in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    pixels = hf.LlavaNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=pinpoints)
    processor = hf.LlavaNextProcessor(
        pixels, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=hf.MistralConfig(**LM, vocab_size=len(words), sliding_window=None),
        image_grid_pinpoints=pinpoints, image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=16)
    return finished(hf.LlavaNextForConditionalGeneration(config)), processor, "plain", LAYOUTS


MADE = {"llava_next": llava_next}


def finished(model):
    from tests.hf.tiny import randomize

    randomize(model)
    model.generation_config.eos_token_id = None                 # answers of equal length
    model.set_attn_implementation("eager")
    return model.eval().float()


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    @cache
    def make(name: str) -> whole.Case:
        model, processor, template, renames = MADE[name]()
        return whole.Case(model, processor, template, examples(), tmp_path_factory.mktemp("tiles") / name, renames)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_ids_are_those_of_the_processor(case, name):
    whole.check_inputs(case(name))


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(case, torch, name):
    whole.check_outputs(case(name), torch)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(case, name):
    whole.check_greedy(case(name))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(case, torch, tmp_path, name):
    whole.check_round_trip(case(name), torch, tmp_path)


@pytest.mark.parametrize(
    ("name", "where", "change", "match"),
    [
        ("llava_next", "", {"image_grid_pinpoints": [[32, 64]]}, r"image_grid_pinpoints is \[\[32, 64\]\] in config.json and \[\[32, 64\], "),
        ("llava_next", "", {"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ("llava_next", "vision_config", {"image_size": 64}, "cuts tiles of .32. pixels; those of the tower have 64"),
    ],
)
def test_what_is_not_supported_is_refused(case, tmp_path, name, where, change, match):
    config = lambda c: c | ({where: c[where] | change} if where else change)
    with pytest.raises(ConfigError, match=match):
        load(rewritten(case(name).folder, tmp_path / "x", config=config))
