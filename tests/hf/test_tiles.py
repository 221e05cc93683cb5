"""Families whose images are cut into tiles: LLaVA-NeXT, Idefics3 and SmolVLM."""

from functools import cache

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.layouts import IDEFICS3
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.hf.load import load
from tests.hf import whole
from tests.hf.test_load import LAYOUTS, rewritten

SIZE, PATCH = 32, 8
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 512}
NAMES = ("llava_next", "idefics3", "smolvlm")


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


def idefics3(kind: str = "Idefics3"):
    import transformers as hf

    words = load_tokenizer("bytes", tokens=(*IDEFICS3.specials, "<end_of_utterance>"))
    pixels = getattr(hf, f"{kind}ImageProcessorPil")(size={"longest_edge": 3 * SIZE}, max_image_size={"longest_edge": SIZE})
    smol = kind == "SmolVLM"            # whose own processor needs torchvision and num2words, for videos; of images it writes the same
    processor = hf.Idefics3Processor(pixels, words, image_seq_len=4)
    config = getattr(hf, f"{kind}Config")(
        vision_config=TOWER | {"model_type": f"{kind.lower()}_vision"}, scale_factor=2, tie_word_embeddings=smol,
        text_config=hf.LlamaConfig(**LM, vocab_size=len(words), rms_norm_eps=1e-5, tie_word_embeddings=smol, pad_token_id=0),
        image_token_id=words.convert_tokens_to_ids("<image>"))
    return finished(getattr(hf, f"{kind}ForConditionalGeneration")(config)), processor, "idefics3", {}


MADE = {"llava_next": llava_next, "idefics3": idefics3, "smolvlm": lambda: idefics3("SmolVLM")}


def finished(model):
    from tests.hf.tiny import randomize

    randomize(model)
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        model.get_input_embeddings().weight.data.mul_(0.05)     # otherwise every token would call for itself
    model.generation_config.eos_token_id = None                 # answers of equal length
    model.set_attn_implementation("eager")
    return model.eval().float()


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    @cache
    def make(name: str) -> whole.Case:
        model, processor, template, renames = MADE[name]()
        folder = tmp_path_factory.mktemp("tiles") / name
        return whole.Case(model, processor, template, examples(), folder, renames)

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
    opened = type(case(name).processor).from_pretrained if name == "smolvlm" else whole.auto_processor
    whole.check_round_trip(case(name), torch, tmp_path, opened)


@pytest.mark.parametrize(
    ("name", "where", "change", "match"),
    [
        ("llava_next", "", {"image_grid_pinpoints": [[32, 64]]}, r"image_grid_pinpoints is \[\[32, 64\]\] in config.json and \[\[32, 64\], "),
        ("llava_next", "", {"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ("idefics3", "vision_config", {"image_size": 25 * PATCH}, "of 25 patches a side transformers may give some the positions of their neighb"),
        ("idefics3", "vision_config", {"image_size": 64}, "cuts tiles of 32 pixels, of a longer side of 96; those of the tower have 64"),
        ("llava_next", "vision_config", {"image_size": 64}, "cuts tiles of .32. pixels; those of the tower have 64"),
    ],
)
def test_what_is_not_supported_is_refused(case, tmp_path, name, where, change, match):
    config = lambda c: c | ({where: c[where] | change} if where else change)
    with pytest.raises(ConfigError, match=match):
        load(rewritten(case(name).folder, tmp_path / "x", config=config))


@pytest.mark.parametrize("name", ["llava_next", "idefics3"])
def test_a_head_is_tied_where_the_whole_says_so(case, tmp_path, name):
    """And not where the language model alone does, as transformers has it there."""
    it = case(name)
    config = lambda c: c | {"text_config": c["text_config"] | {"tie_word_embeddings": True}}
    assert load(rewritten(it.folder, tmp_path / "x", config=config))[0] == it.cfg and it.cfg.decoder.head == "own"


def test_patches_of_accepted_towers_have_the_positions_that_transformers_gives_them(torch):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    from mllm_jax.hf.idefics3 import in_order

    moved = set()
    for n in range(1, 71):
        embed = Idefics3VisionEmbeddings(Idefics3VisionConfig(hidden_size=1, image_size=n, patch_size=1)).requires_grad_(False)
        embed.patch_embedding.weight.zero_(), embed.patch_embedding.bias.zero_()
        embed.position_embedding.weight[:, 0] = torch.arange(n * n)
        theirs = embed(torch.zeros(1, 3, n, n), torch.ones(1, n, n, dtype=torch.bool)).flatten()
        moved |= {n} if (theirs != torch.arange(n * n)).any() else set()
    assert {25, 29, 31} <= moved <= {n for n in range(1, 71) if not in_order(n)}
    assert all(map(in_order, (4, 14, 16, 24, 26, 27, 32, 64)))
