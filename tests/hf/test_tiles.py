"""Families whose images are cut into tiles: LLaVA-NeXT, Idefics3 and SmolVLM, which reads videos, too."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.data.layouts import IDEFICS3, IDEFICS3_WHOLE, SMOLVLM_VIDEO
from mllm_jax.data.tiles import OneTile
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.hf import idefics3 as family
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.types import Blob
from tests.data.test_video import clip
from tests.hf import whole
from tests.hf.test_load import LAYOUTS, rewritten
from tests.hf.test_onevision import example, png
from tests.hf.tiny_gemma import pictures, talk

SIZE, PATCH = 32, 8
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 512}
NAMES = ("llava_next", "idefics3", "smolvlm")


# A wide and a tall image, one image, and none; a video.
EXAMPLES = talk(2, "the same?", "no"), talk(1, "what is it?", "the moon"), talk(0, "who is there?", "me")
VIDEO = Blob(kind="video", data=clip(total=4, rate=1))


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
    return whole.finished(hf.LlavaNextForConditionalGeneration(config)), processor, "plain", LAYOUTS


# Of which a tokenizer learns pairs across the seam of a prompt and the text of a video.
WORDS = ["User: You are provided the following series of four frames", "[H:MM:SS] video.\n\nFrame from 00:", "\n\nwhich? \n\nwho is there?"] * 2


class SmolCase(whole.FilmCase):
    """Images and frames are one input there, and the processor would let the frames take the place of the images."""

    def theirs(self, length: int, *, prompt: bool = False) -> dict:
        import torch

        inputs = super().theirs(length, prompt=prompt)
        images = self.processor.image_processor([pictures(e) for e in self.examples], return_tensors="pt")["pixel_values"]
        films = iter(inputs["pixel_values"])
        rows = []
        for e, tiles in zip(self.examples, images):
            tiles = tiles[(tiles != 0).flatten(1).any(1)]
            kinds = [blob.kind for blob in e.media]
            rows.append(torch.cat([next(films), tiles]) if "video" in kinds else tiles)    # a video comes first in its row here
        most = max(map(len, rows))
        pixels = torch.stack([torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows])
        return {k: inputs[k] for k in ("input_ids", "attention_mask")} | {"pixel_values": pixels}

    def films(self, videos, **_) -> dict:
        import torch
        from transformers.video_utils import VideoMetadata

        large = lambda frame: frame.resize((3 * SIZE, int(3 * SIZE * frame.height / frame.width)), Image.Resampling.LANCZOS)
        frames = whole.film(videos, lambda frame: large(frame).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        facts = [VideoMetadata(total_num_frames=len(v), fps=1.0, duration=float(len(v)), frames_indices=list(range(len(v)))) for v in videos]
        return {"pixel_values": torch.tensor(frames), "video_metadata": facts}


def smolvlm(words, image_processor):
    """Its processor, which wants num2words besides torchvision."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = {4: "four"}.__getitem__
    return whole.without_films(processing_smolvlm.SmolVLMProcessor)(image_processor, words, None, image_seq_len=4)


def idefics3(kind: str = "Idefics3", split: bool = True):
    import transformers as hf

    words = load_tokenizer("bpe:400", WORDS, tokens=(*IDEFICS3.specials, "<end_of_utterance>"))
    pixels = getattr(hf, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 3 * SIZE}, max_image_size={"longest_edge": SIZE}, do_image_splitting=split)
    smol = kind == "SmolVLM"
    processor = smolvlm(words, pixels) if smol else hf.Idefics3Processor(pixels, words, image_seq_len=4)
    config = getattr(hf, f"{kind}Config")(
        vision_config=TOWER | {"model_type": f"{kind.lower()}_vision"}, scale_factor=2, tie_word_embeddings=smol,
        text_config=hf.LlamaConfig(**LM, vocab_size=len(words), rms_norm_eps=1e-5, tie_word_embeddings=smol, pad_token_id=0),
        image_token_id=words.convert_tokens_to_ids("<image>"))
    return whole.finished(getattr(hf, f"{kind}ForConditionalGeneration")(config)), processor, "idefics3", {}


MADE = {"llava_next": llava_next, "idefics3": idefics3, "idefics3 whole": lambda: idefics3(split=False), "smolvlm": lambda: idefics3("SmolVLM")}


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    @cache
    def make(name: str) -> whole.Case:
        model, processor, template, renames = MADE[name]()
        folder = tmp_path_factory.mktemp("tiles") / name
        kind, more = (SmolCase, (example(VIDEO, png(40, 64), "which?"),)) if name == "smolvlm" else (whole.Case, ())
        return kind(model, processor, template, EXAMPLES + more, folder, renames)

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
    import transformers as hf

    def smol(folder):
        """The processor part by part: what opens all of them at once wants torchvision."""
        kept = json.loads((folder / "processor_config.json").read_text())
        film = kept["video_processor"]
        assert (film["num_frames"], film["fps"]) == (64, 1.0) and film["size"] == {"longest_edge": 3 * SIZE}
        return type(case(name).processor)(
            hf.SmolVLMImageProcessorPil.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder), None, kept["image_seq_len"])

    whole.check_round_trip(case(name), torch, tmp_path, smol if name == "smolvlm" else whole.auto_processor)


def test_images_that_are_not_split(case, tmp_path):
    it = case("idefics3 whole")
    whole.check_inputs(it, least=3)
    tower = it.cfg.inputs["image"]
    assert tower.layout == IDEFICS3_WHOLE and tower.view == OneTile(size=SIZE, longest=3 * SIZE)
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=512)
    assert describe(folder) == (family.IDEFICS3, it.cfg)


def test_a_video_processor_may_stand_inside_that_of_images():
    """As in the folders of SmolVLM2, where the size of images overrules that of videos."""
    image = OneTile(size=512, longest=2_048)
    sampling = {"fps": 2, "max_frames": 32, "video_size": {"longest_edge": 512}}
    inside = family.frames({"size": {"longest_edge": 2_048}, "video_sampling": sampling}, image)
    assert (inside.frames, inside.fps, inside.pick, inside.view) == (32, 2.0, "inside", image)
    assert family.frames({"video_processor": {"video_sampling": sampling}}, image).view.longest == 512
    own = family.frames({"size": {"longest_edge": 2_048}, "video_processor": {"num_frames": 8, "fps": 1, "size": {"longest_edge": 512}}}, image)
    assert (own.frames, own.fps, own.view.longest) == (8, 1.0, 512)


def test_the_tower_of_smolvlm_reads_videos_as_images(case):
    it = case("smolvlm")
    video = it.cfg.inputs["image"].also["video"]
    assert video.layout == SMOLVLM_VIDEO and (video.view.frames, video.view.fps) == (64, 1.0)
    joined = [it.tokenizer.decode([token]) for token in np.asarray(it.batch([[it.examples[-1]]]).tokens)[0]]
    assert " You" in joined and joined.count("<image>") == 4 * 4 + 4 * 7 and "<video>" not in it.tokenizer.get_vocab()


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
