"""Evaluation: the same numbers on one device, on eight, and in two processes; exactly once; resumable."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.sources import open_source
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.evaluation.metrics import exact_match
from mllm_jax.evaluation.run import evaluate, fingerprint
from mllm_jax.evaluation.tasks import Answers, Perplexity, Retrieval, ZeroShot, _unpack
from mllm_jax.sharding import Layout
from tests.evaluation import small

one_device = lambda: Layout().make_mesh(jax.devices()[:1])
lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
ids = [f"shapes/0/{i:05d}" for i in range(11)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, small.run(folder, mesh=one_device())


def same(a, b):
    """Equal but for seconds; floats to 1e-5, since sums are in another order on other devices."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a.keys() - {"seconds"}:
            same(a[k], b[k])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5)
    else:
        assert a == b


def test_every_example_is_answered_once(one):
    folder, results = one
    for name in ("answers", "answers/shuffled_image", "answers/blank_image", "perplexity", "retrieval"):
        assert [r["id"] for r in lines(folder / name / "merged.jsonl")] == ids
        assert sorted(r["id"] for r in lines(folder / name / "part-00000.jsonl")) == ids
    assert {r["n"] for r in results.values()} == {11}
    assert json.loads((folder / "answers/result.json").read_text()) == json.loads(json.dumps(results["answers"]))


def test_the_numbers_are_those_of_the_records(one):
    folder, results = one
    records = lines(folder / "answers" / "merged.jsonl")
    hits = [exact_match(r["prediction"], r["answers"]) for r in records]
    assert results["answers"]["exact_match"] == np.mean(hits)
    assert set(results["answers"]["baselines"]) == {"most_frequent", "shuffled_image", "blank_image"}
    nll = lines(folder / "perplexity" / "merged.jsonl")
    assert results["perplexity"]["perplexity"] == pytest.approx(
        math.exp(sum(r["nll"] for r in nll) / sum(r["tokens"] for r in nll))
    )


def test_the_answers_depend_on_the_images(one):
    """Else shuffled and blank images would say nothing."""
    folder, _ = one
    texts = [
        [r["prediction"] for r in lines(folder / "answers" / name / "merged.jsonl")]
        for name in ("", "shuffled_image", "blank_image")
    ]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_eight_devices_give_the_numbers_of_one(one, tmp_path):
    mixed = Layout(mesh={"fsdp": 2, "tensor": 2, "context": 2})
    results = small.run(tmp_path, layout=mixed)
    same(results, one[1])
    for name in ("answers", "answers/shuffled_image", "answers/blank_image"):
        assert lines(tmp_path / name / "merged.jsonl") == lines(one[0] / name / "merged.jsonl")


def test_two_processes_give_the_numbers_of_one(one, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.evaluation.small"]
    processes = [
        subprocess.Popen(
            [*command, str(p), "2", port, str(tmp_path)], cwd=root, env=env, stderr=subprocess.PIPE, text=True
        )
        for p in (0, 1)
    ]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    for name in ("answers", "retrieval"):
        same(
            json.loads((tmp_path / name / "result.json").read_text()),
            json.loads((one[0] / name / "result.json").read_text()),
        )
    parts = [lines(tmp_path / "answers" / f"part-{p:05d}.jsonl") for p in (0, 1)]
    assert all(parts) and sorted(r["id"] for part in parts for r in part) == ids
    assert lines(tmp_path / "answers" / "merged.jsonl") == lines(one[0] / "answers" / "merged.jsonl")
    tensor = tmp_path / "tensor" / "perplexity"
    same(json.loads((tensor / "result.json").read_text()), json.loads(json.dumps(one[1]["perplexity"])))
    assert [len(lines(tensor / f"part-{p:05d}.jsonl")) for p in (0, 1)] == [11, 0]
    same(json.loads((tmp_path / "seen-by-1.json").read_text())["answers"]["by_kind"], one[1]["answers"]["by_kind"])


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_goes_on(one, tmp_path):
    seen = []

    def stop(name, done, total):
        seen.append(done)
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        small.run(tmp_path, ["answers"], mesh=one_device(), progress=stop)
    part = tmp_path / "answers" / "part-00000.jsonl"
    before = part.read_text()
    assert len(before.splitlines()) == 4 and seen == [0, 4]
    part.write_text(before + '{"id": "shapes/0/00009", "kin')  # the line that was being written
    counts = []
    results = small.run(
        tmp_path, ["answers"], mesh=one_device(), progress=lambda name, done, total: counts.append((name, done))
    )
    assert counts[0] == ("", 4)
    assert part.read_text().startswith(before)
    same(results["answers"], one[1]["answers"])
    assert lines(tmp_path / "answers" / "merged.jsonl") == lines(one[0] / "answers" / "merged.jsonl")


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path):
    cfg, _, template = small.tasks()["perplexity"]
    task, params, tokenizer = (
        Perplexity(source=small.SOURCE, limit=2, rows=2),
        small.spread(cfg),
        load_tokenizer("bytes"),
    )
    go = lambda params, task=task, **kw: evaluate(
        cfg, params, task, tokenizer, folder=tmp_path / "p", template=template, mesh=one_device(), **kw
    )
    first = go(params)
    other = params | {"decoder/norm/scale": params["decoder/norm/scale"] * 1.5}
    with pytest.raises(ConfigError, match=r"another evaluation \(its weights differ\)"):
        go(other)
    with pytest.raises(ConfigError, match=r"its task differ"):
        go(params, replace(task, limit=1))
    assert go(other, restart=True)["perplexity"] != first["perplexity"]


def test_a_lost_line_and_a_doubled_one_are_noticed(tmp_path):
    cfg, _, template = small.tasks()["perplexity"]
    task, params, tokenizer = (
        Perplexity(source=small.SOURCE, limit=2, rows=2),
        small.spread(cfg),
        load_tokenizer("bytes"),
    )
    go = lambda: evaluate(cfg, params, task, tokenizer, folder=tmp_path, template=template, mesh=one_device())
    go()
    part = tmp_path / "part-00000.jsonl"
    part.write_text(part.read_text() + part.read_text().splitlines()[0] + "\n")
    with pytest.raises(RuntimeError, match="1 records are too many"):
        go()
    part.write_text("not json\n")
    with pytest.raises(ConfigError, match=r"part-00000.jsonl:1 is not a record"):
        go()


def test_the_fingerprint_sees_a_bit_and_not_the_sharding():
    params = small.spread(small.llm())
    name = "decoder/embedding/table"
    changed = params[name].copy()
    changed.view(np.uint32)[3, 5] ^= 1
    assert fingerprint(params) != fingerprint(params | {name: changed})
    spread = jax.device_put(
        params[name], jax.sharding.NamedSharding(Layout().make_mesh(), jax.sharding.PartitionSpec("data"))
    )
    assert fingerprint(params) == fingerprint(params | {name: spread})


# --- tasks --------------------------------------------------------------------------------------------------------


def test_retrieval_is_brute_force_on_the_records(one):
    folder, results = one
    records = lines(folder / "retrieval" / "merged.jsonl")
    media = np.stack([_unpack(r["media"]) for r in records])
    texts, owner = np.stack([_unpack(t) for r in records for t in r["texts"]]), np.repeat(range(11), 2)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    hits = [owner[np.argsort(-(media[i] @ texts.T))[0]] == i for i in range(11)]
    back = [np.argsort(-(texts[t] @ media.T))[0] == owner[t] for t in range(22)]
    assert results["retrieval"]["image_to_text_r1"] == np.mean(hits)
    assert results["retrieval"]["text_to_image_r1"] == np.mean(back)
    assert 0 < results["retrieval"]["image_to_text_r10"] < 1


def test_pools_are_averaged_and_the_rest_is_counted(one, tmp_path):
    records = lines(one[0] / "retrieval" / "merged.jsonl")
    got = Retrieval(source="", pool=4).result({"": records}, None)
    halves = [
        Retrieval(source="", pool=4).result({"": records[at : at + 4]}, None)["image_to_text_r1"] for at in (0, 4)
    ]
    assert got["image_to_text_r1"] == np.mean(halves)
    assert (got["n"], got["pools"], got["left_out"]) == (8, 2, 3)


def test_equal_captions_are_right_for_both():
    row = lambda id, v, caption: {
        "id": id,
        "kind": "",
        "captions": [caption],
        "media": _packed(v),
        "texts": [_packed(v)],
    }
    records = [row("a", [1, 0], "a dog"), row("b", [1, 0], "a dog")]
    assert Retrieval(source="").result({"": records}, None)["image_to_text_r1"] == 1
    records[1]["captions"] = ["a cat"]
    assert Retrieval(source="").result({"": records}, None)["image_to_text_r1"] == 0


def _packed(v):
    from mllm_jax.evaluation.tasks import _pack

    return _pack(np.array(v, np.float32))


def test_shuffled_and_blank_images():
    from mllm_jax.evaluation.run import _requests

    source = open_source(small.SOURCE)
    requests = _requests(source, 11)
    passes = Answers(source=small.SOURCE).passes(requests, source)
    own = [source[i] for i in range(11)]
    for i in passes["shuffled_image"].indices:
        lent = passes["shuffled_image"].change(own[i], i)
        assert lent.media[0].data != own[i].media[0].data and lent.media[0].data in [e.media[0].data for e in own]
        assert replace(lent, media=own[i].media) == own[i]
    blank = {passes["blank_image"].change(e, i).media[0].data for i, e in enumerate(own)}
    assert len(blank) == 1 and len(passes["shuffled_image"].indices) == 11


def test_the_most_frequent_answer_may_come_from_training_answers():
    row = lambda i, kind, gold: {
        "id": str(i),
        "kind": kind,
        "answers": [gold],
        "prediction": "x",
        "score": 0.0,
        "stopped": True,
    }
    records = {"": [row(0, "count", "1"), row(1, "count", "1"), row(2, "count", "3")]}
    got = Answers(source="").result(records, None)
    assert (
        got["baselines"] == {"most_frequent": pytest.approx(2 / 3)} and got["most_frequent_from"] == "the gold answers"
    )
    env = type("Env", (), {"root": None})
    got = Answers(source="", train="shapes:?count=200").result(records, env)
    train = [e.answers[0] for e in (open_source("shapes:?count=200")[i] for i in range(200)) if e.kind == "count"]
    best = max(sorted(set(train)), key=train.count)
    assert got["baselines"]["most_frequent"] == np.mean([best == r["answers"][0] for r in records[""]])
    assert got["most_frequent_from"] == "200 answers of shapes:?count=200"


def test_confusion_is_of_the_chosen_kinds():
    row = lambda kind, gold, said: {
        "id": gold + said,
        "kind": kind,
        "answers": [gold],
        "prediction": said,
        "score": 0.0,
        "stopped": True,
    }
    records = {"": [row("digit", "1", "7"), row("digit", "7", "7"), row("sum", "9", "3")]}
    got = Answers(source="", baselines=False, confusion=("digit",)).result(records, None)
    assert got["confusion"] == {"labels": ["1", "7"], "counts": [[0, 1, 0], [0, 1, 0]]}


def test_a_source_with_an_id_twice_is_refused(tmp_path):
    from mllm_jax.evaluation.run import _requests

    example = open_source(small.SOURCE)[0]
    with pytest.raises(ConfigError, match="1 ids more than once"):
        _requests([example, example], 2)


def pictures():
    """Six pictures, each with one of four classes in turn."""
    from mllm_jax.types import Blob, Example
    from tests.hf.tiny import images

    return [
        Example(id=f"p{i}", media=(Blob(kind="image", data=x),), answers=(CLASSES[i % 4],))
        for i, x in enumerate(images(6))
    ]


CLASSES, PROMPTS = ("red", "blue", "green", "yellow"), ("{}", "a {}!")


def letters():
    """A tokenizer of one id a letter, with the special ids of the tiny CLIP."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {"<unk>": 0, "<pad>": 1, "<s>": 93, "</s>": 94} | {
        c: 2 + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz !")
    }
    backend = Tokenizer(models.BPE(vocab=known, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_zero_shot_is_that_of_transformers(tmp_path, torch):
    from mllm_jax.hf.load import load
    from tests.hf import tiny

    theirs, processor = tiny.build("clip")
    tiny.save("clip", tmp_path / "clip")
    cfg, params = load(tmp_path / "clip")
    tokenizer = letters()
    task = ZeroShot(source="python:tests.evaluation.test_run:pictures", classes=CLASSES, templates=PROMPTS, rows=4)
    result = evaluate(cfg, params, task, tokenizer, folder=tmp_path / "z", template="clip", mesh=one_device())
    with torch.no_grad():
        vectors = []
        for name in CLASSES:
            ids = [[93, *tokenizer.encode(t.replace("{}", name), add_special_tokens=False), 94] for t in PROMPTS]
            each = [theirs.get_text_features(input_ids=torch.tensor([i])).pooler_output[0] for i in ids]
            mean = torch.stack([e / e.norm() for e in each]).mean(0)
            vectors.append(mean / mean.norm())
        media = theirs.get_image_features(pixel_values=tiny.pixel_values(processor, tiny.images(6))).pooler_output
    scores = (media / media.norm(dim=1, keepdim=True) @ torch.stack(vectors).T).numpy()
    records = lines(tmp_path / "z" / "merged.jsonl")
    assert [r["prediction"] for r in records] == [CLASSES[i] for i in scores.argmax(1)]
    ranks = [int((scores[i] > scores[i, i % 4]).sum()) for i in range(6)]
    assert [r["rank"] for r in records] == ranks and len(set(ranks)) > 1
    assert result["top1"] == np.mean([r < 1 for r in ranks]) and result["top5"] == 1.0


def texts():
    from mllm_jax.types import Example, Part, Turn

    say = lambda role, text: Turn(role=role, parts=(Part(text=text),))
    pairs = (
        ("what", "a dog"),
        ("who is it", "nobody at all"),
        ("a", "b"),
        ("how many cats", "none"),
        ("is it red", "no"),
    )
    return [Example(id=q, turns=(say("user", q), say("assistant", a))) for q, a in pairs]


def test_perplexity_is_that_of_transformers(tmp_path, torch):
    from mllm_jax.data.tokenize import encode
    from mllm_jax.hf.load import load
    from mllm_jax.models.mllm import MLLMConfig
    from tests.hf import tiny

    (theirs, _), tokenizer = tiny.save("llama", tmp_path / "llama"), letters()
    decoder, params = load(tmp_path / "llama")
    task = Perplexity(source="python:tests.evaluation.test_run:texts", rows=2)
    result = evaluate(
        MLLMConfig(inputs={}, decoder=decoder),
        {f"decoder/{k}": v for k, v in params.items()},
        task,
        tokenizer,
        folder=tmp_path / "p",
        template="plain",
        mesh=one_device(),
    )
    nll, count = 0.0, 0
    for example in texts():
        tokens = encode(example, template="plain", tokenizer=tokenizer, towers={})
        trained = torch.tensor(np.where(tokens.weights > 0, tokens.targets, -100)).long()
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens.tokens[None]).long()).logits[0]
        nll += torch.nn.functional.cross_entropy(logits.double(), trained, reduction="sum").item()
        count += int((trained >= 0).sum())
    assert result["tokens"] == count > 25
    assert result["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_a_class_that_is_not_listed_is_refused(tmp_path):
    cfg, _, _ = small.tasks()["retrieval"]
    task = ZeroShot(source=small.SOURCE, classes=("red", "blue"))
    with pytest.raises(ConfigError, match="not among the 2 classes"):
        evaluate(
            cfg, small.spread(cfg), task, load_tokenizer("bytes"), folder=tmp_path, template="clip", mesh=one_device()
        )
    with pytest.raises(ConfigError, match="has {} where the class stands"):
        ZeroShot(source="", classes=("a",), templates=("no place",))
