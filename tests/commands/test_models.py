"""generate, evaluate, import and export on folders: a tiny random model goes all the way round."""

import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mllm_jax.cli import main
from mllm_jax.commands import common
from mllm_jax.commands.evaluate import lines, make_task
from mllm_jax.config import ConfigError, load
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.evaluation.tasks import Answers
from mllm_jax.hf.export import export
from mllm_jax.hf.load import load as load_folder
from mllm_jax.nn.param import split
from mllm_jax.train import run
from mllm_jax.train.adapters import model_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LLaVA with a tokenizer of bytes, as a Hugging Face folder."""
    cfg = load("projector/llava_15").model.tiny()
    params = jax.jit(lambda: split(cfg.build(rngs=nnx.Rngs(0)))[1])()
    return export(params, cfg, tmp_path_factory.mktemp("model") / "llava", tokenizer=load_tokenizer("bytes"))


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def command(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_a_prompt_with_an_image_is_answered_the_same_each_time(folder, image, capsys):
    argv = ("generate", folder, "--image", image, "--prompt", "what?", "--template", "plain", "--max-new-tokens", 4)
    first, again = command(capsys, *argv), command(capsys, *argv)
    assert first == again and first[0] == 0 and first[2] == ""


def test_a_record_is_asked_and_its_answer_shown(folder, capsys):
    code, out, err = command(capsys, "generate", folder, "--source", "shapes", "--index", 2, "--template", "plain", "--max-new-tokens", 2)
    assert code == 0, err
    question, answer, right = out.splitlines()
    assert question.startswith("question: ") and answer.startswith("answer:") and len(right) > len("right: ")


def test_a_record_that_is_not_there_and_a_folder_without_chat_format(folder, image, capsys):
    code, _, err = command(capsys, "generate", folder, "--source", "shapes", "--index", 10**9, "--template", "plain")
    assert code == 2 and "is not one of them" in err
    code, _, err = command(capsys, "generate", folder, "--prompt", "x", "--image", image)
    assert code == 2 and "has no chat template" in err


def test_a_broken_image_is_named_by_its_reason(folder, tmp_path, capsys):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(data, "JPEG")
    (tmp_path / "half.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    code, _, err = command(capsys, "generate", folder, "--prompt", "x", "--image", tmp_path / "half.jpg", "--template", "plain")
    assert code == 1 and "decode" in err and err.count("\n") == 1


def test_a_folder_is_evaluated_and_the_numbers_are_kept(folder, tmp_path, capsys):
    argv = ("evaluate", folder, "perplexity", "source=shapes", "limit=5", "--template", "plain", "--out", tmp_path / "evals")
    code, out, err = command(capsys, *argv)
    assert code == 0, err
    kept = json.loads((tmp_path / "evals" / "perplexity" / "result.json").read_text())
    assert kept["n"] == 5 and f"{kept['perplexity']:.4f}" in out


def test_import_and_export_come_back_to_the_same_bytes(folder, tmp_path, capsys):
    assert command(capsys, "import", folder, tmp_path / "ours")[0] == 0
    assert command(capsys, "export", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "theirs" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_adapters_are_written_apart_from_their_base(tmp_path, capsys, monkeypatch):
    recipe = load("projector/llava_15", "stages.instruct.lora.rank=2", tiny=True)
    cfg = model_of(recipe, "instruct")
    params = jax.jit(lambda: split(cfg.build(rngs=nnx.Rngs(0)))[1])()
    monkeypatch.setattr(common, "is_run", lambda folder: True)
    monkeypatch.setattr(common, "open_model", lambda source, layout: (recipe, cfg, params, load_tokenizer("bytes")))
    monkeypatch.setattr(run, "last_stage", lambda folder, recipe: "instruct")
    code, out, _ = command(capsys, "export", "run", tmp_path / "adapter", "--adapter")
    assert code == 0 and out.endswith("its base: mllm-jax export run BASE --base\n")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert command(capsys, "export", "run", tmp_path / "base", "--base")[0] == 0
    base = load_folder(tmp_path / "base")[1]
    assert base.keys() == {k for k in params if "/lora/" not in k} and all(np.array_equal(params[k], x) for k, x in base.items())
    monkeypatch.setattr(common, "is_run", lambda folder: False)
    code, _, err = command(capsys, "export", tmp_path / "base", tmp_path / "again", "--adapter")
    assert code == 2 and "--adapter and --base are for runs" in err


def test_a_task_is_made_of_its_fields():
    assert make_task(Answers, ["source=shapes", "limit=7"]) == Answers(source="shapes", limit=7)
    with pytest.raises(ConfigError, match="has no field 'limti'; nearest: limit"):
        make_task(Answers, ["limti=7"])
    with pytest.raises(ConfigError, match="needs source="):
        make_task(Answers, [])


def test_results_are_lines():
    assert lines({"by_kind": {"sum": 1.0}, "kinds": {"sum": {"mean": 1.0, "low": 0.5, "high": 1.0, "n": 4}}}) == [
        "  kinds", "    sum                  1.0000   0.5000 to 1.0000, n=4"]
    assert lines({"a": 0.5, "by_kind": {"sum": 1.0}, "n": 3, "confusion": {"1": {"2": 3}}}) == [
        "  a                    0.5000", "  by_kind", "    sum                  1.0000", "  n                    3"]
