"""What can be evaluated, as values: `Answers`, `Retrieval`, `ZeroShot`, `Perplexity`.

A task says how an example becomes a record (`start` gives the functions that do it on a mesh) and how the
records of all examples become numbers (`result`, plain Python on the merged file).  `run.py` does the rest.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mllm_jax.config import ConfigError, config
from mllm_jax.data.errors import BadExample
from mllm_jax.data.images import image_size
from mllm_jax.data.record import read_blob
from mllm_jax.data.sources import Source, open_source
from mllm_jax.evaluation import metrics
from mllm_jax.evaluation.forward import Embedder, Scorer
from mllm_jax.generate import Generator, Sampling, batch_rows
from mllm_jax.sharding import Layout
from mllm_jax.types import Blob, Example, record

Record = dict[str, Any]
BLANK = (128, 128, 128)


@record
class Env:
    """What a task is given: the model, where it runs, and how text is written."""

    model: Any
    params: Mapping[str, Any]
    tokenizer: Any
    layout: Layout
    mesh: Mesh
    template: str
    seq_len: int | None
    root: Path | None

    @property
    def parts(self) -> tuple:
        return self.model, self.params, self.tokenizer, self.layout, self.mesh, self.template


class Runner(Protocol):
    """A task at work."""

    rows: int                                                                   # of a global batch

    def shape(self, example: Example) -> tuple[int, ...]: ...                   # equal within a batch
    def run(self, examples: Sequence[Example], shape: tuple[int, ...]) -> list[Record]: ...


@record
class Request:
    """An example that is asked for: where it is, and what tells its media apart."""

    index: int
    id: str
    media: str                          # hash of all its media, "" without any
    kinds: tuple[str, ...]              # their modalities


@record
class Pass:
    """One way through the examples."""

    indices: tuple[int, ...]
    change: Callable[[Example, int], Example] | None = None     # of an example and its index


class Task:
    """What all tasks have; a task adds the fields, `start` and `result`."""

    source: str
    limit: int | None

    def tiny(self) -> "Task":
        """The same on sixteen examples."""
        few = {"limit": 16, "rows": 8, "train_limit": 200}
        return replace(self, **{name: n for name, n in few.items() if hasattr(self, name)})

    def start(self, env: Env) -> Runner:
        raise NotImplementedError

    def passes(self, requests: Sequence[Request], source: Source) -> dict[str, Pass]:
        """The ways through the examples by the name of their folder; "" is the model itself."""
        return {"": Pass(indices=tuple(r.index for r in requests))}

    def result(self, records: Mapping[str, Sequence[Record]], env: Env) -> Record:
        """Numbers from all records of every pass, in the order of the source."""
        raise NotImplementedError


@config
class Answers(Task):
    """Generated answers against the accepted ones: exact match after `metrics.normalise`, greedy.

    With `baselines`, three numbers that need no trust in the model: the most frequent answer of each kind, the
    same model on images of another example (nobody keeps its own), and on grey images of the same sizes.
    """

    source: str
    limit: int | None = None            # only so many examples, the first; None: all
    max_new_tokens: int = 32
    baselines: bool = True
    train: str | None = None            # where the most frequent answers come from; None: the gold answers themselves
    train_limit: int = 10_000
    confusion: tuple[str, ...] = ()     # kinds of which a table of truth and prediction is made, together
    rows: int = 32

    def start(self, env: Env) -> Runner:
        return _Answering(self, env)

    def passes(self, requests: Sequence[Request], source: Source) -> dict[str, Pass]:
        out = super().passes(requests, source)
        with_media = [r for r in requests if r.media]
        if not self.baselines or not with_media:
            return out
        found = metrics.derangement([r.media for r in with_media], [r.kinds for r in with_media])
        other = {with_media[i].index: with_media[j].index for i, j in found.items()}
        swap = lambda e, i: replace(e, media=_instead(e.media, source[other[i]].media)) if i in other else e
        if other:
            # An example whose images nobody else can lend has no place in this pass.
            indices = tuple(r.index for r in requests if r.index in other or not r.media)
            out["shuffled_image"] = Pass(indices=indices, change=swap)
        if any("image" in r.kinds for r in requests):
            out["blank_image"] = Pass(indices=out[""].indices, change=lambda e, i: replace(e, media=tuple(map(_blank, e.media))))
        return out

    def result(self, records: Mapping[str, Sequence[Record]], env: Env) -> Record:
        own = records[""]
        table = metrics.by_kind([r["score"] for r in own], [r["kind"] for r in own])
        low, high = metrics.bootstrap([r["score"] for r in own])
        out = {
            "exact_match": _mean(own), "ci95": [low, high], "n": len(own),
            "by_kind": {kind: row["mean"] for kind, row in table.items()},
            "kinds": table,
            "cut_off": float(np.mean([not r["stopped"] for r in own])),         # answers that ran into max_new_tokens
            "empty": float(np.mean([not r["prediction"] for r in own])),
        }
        if self.baselines:
            guess, origin = self._frequent(own, env)
            guessed = [r | {"score": metrics.exact_match(guess.get(r["kind"], ""), r["answers"])} for r in own]
            each = {"most_frequent": guessed} | {name: rows for name, rows in records.items() if name}
            out["baselines"] = {name: _mean(rows) for name, rows in each.items()}
            out["baselines_by_kind"] = {
                name: {k: v["mean"] for k, v in metrics.by_kind([r["score"] for r in rows], [r["kind"] for r in rows]).items()}
                for name, rows in each.items()}
            out["most_frequent_from"] = origin
        if chosen := [r for r in own if r["kind"] in self.confusion]:
            out["confusion"] = metrics.confusion((r["answers"][0], r["prediction"]) for r in chosen)
        return out

    def _frequent(self, own: Sequence[Record], env: Env) -> tuple[dict[str, str], str]:
        if self.train is None:
            return metrics.most_frequent((r["kind"], r["answers"][0]) for r in own), "the gold answers"
        source = open_source(self.train, env.root)
        n = min(len(source), self.train_limit)
        # Spread over the source, which may be sorted.
        examples = (source[i] for i in np.linspace(0, len(source) - 1, n).astype(int).tolist())
        return metrics.most_frequent((e.kind, a) for e in examples for a in answers_of(e)[:1]), f"{n} answers of {self.train}"


class _Answering:
    def __init__(self, task: Answers, env: Env):
        model, params, tokenizer, layout, mesh, template = env.parts
        self.generator = Generator(model, params, tokenizer, layout=layout, mesh=mesh, template=template, rows=task.rows)
        self.rows, self.sampling = self.generator.rows, Sampling(max_new_tokens=task.max_new_tokens)
        self.shape = self.generator.shape

    def run(self, examples: Sequence[Example], shape: tuple[int, ...]) -> list[Record]:
        return [
            {"id": e.id, "kind": e.kind, "question": question_of(e), "answers": list(gold := answers_of(e)), "prediction": a.text,
             "score": metrics.exact_match(a.text, gold), "num_tokens": a.num_tokens, "stopped": a.stopped}
            for e, a in zip(examples, self.generator.run(examples, shape, self.sampling), strict=True)]


@config
class Retrieval(Task):
    """Recall at 1, 5 and 10 between media and captions, both ways, within pools of `pool` examples (None: one pool).

    A caption is right for every example that has a caption with the same text.  Pools are consecutive examples
    and their recalls are averaged; what does not fill a pool is left out and counted as `left_out`.
    """

    source: str
    pool: int | None = None
    limit: int | None = None
    modality: str = "image"
    captions: int | None = None         # at most so many captions of an example, the first
    rows: int = 32

    def start(self, env: Env) -> Runner:
        return _Retrieving(self, env)

    def result(self, records: Mapping[str, Sequence[Record]], env: Env) -> Record:
        own = records[""]
        size = min(self.pool or len(own), len(own))
        pools = [own[at : at + size] for at in range(0, len(own) - size + 1, size)]
        each = [_pool_recall(pool) for pool in pools]
        return {k: float(np.mean([e[k] for e in each])) for k in each[0]} | {
            "n": size * len(pools), "pool": size, "pools": len(pools), "left_out": len(own) - size * len(pools),
            "captions": sum(len(r["captions"]) for r in own)}


class _Retrieving:
    def __init__(self, task: Retrieval, env: Env):
        self.task, self.rows = task, batch_rows(task.rows, env.mesh)
        self.embedder = Embedder(*env.parts, modality=task.modality, seq_len=env.seq_len)

    def captions(self, example: Example) -> list[str]:
        captions = [c for c in example.captions if c.strip()][: self.task.captions]
        if not captions:
            raise BadExample(example.id, "no_text", "retrieval needs a caption")
        return captions

    def shape(self, example: Example) -> tuple[int, ...]:
        return (len(self.captions(example)),)

    def run(self, examples: Sequence[Example], shape: tuple[int, ...]) -> list[Record]:
        media = self.embedder.media(examples)
        texts = [self.embedder.texts([self.captions(e)[i] for e in examples]) for i in range(shape[0])]
        return [
            {"id": e.id, "kind": e.kind, "captions": self.captions(e), "media": _pack(media[b]),
             "texts": [_pack(t[b]) for t in texts]}
            for b, e in enumerate(examples)]


def _pool_recall(pool: Sequence[Record]) -> dict[str, float]:
    media = np.stack([_unpack(r["media"]) for r in pool])
    texts = np.stack([_unpack(t) for r in pool for t in r["texts"]])
    captions = [c for r in pool for c in r["captions"]]
    relevant = np.array([[c in own for c in captions] for own in (set(r["captions"]) for r in pool)])
    return metrics.retrieval(media, texts, relevant)


@config
class ZeroShot(Task):
    """Classification by text: the class whose prompts are nearest to the medium (CLIP, section 3.1.4).

    The vector of a class is the mean of the unit vectors of its prompts, made a unit vector again.  The truth is
    the first of an example's answers, a name in `classes`.
    """

    source: str
    classes: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    limit: int | None = None
    modality: str = "image"
    rows: int = 32

    def __post_init__(self):
        if bad := [t for t in self.templates if "{}" not in t]:
            raise ConfigError(f"a template of zero-shot prompts has {{}} where the class stands; {bad[0]!r} has not")

    def start(self, env: Env) -> Runner:
        return _Classifying(self, env)

    def result(self, records: Mapping[str, Sequence[Record]], env: Env) -> Record:
        own = records[""]
        hits = metrics.recall(np.array([r["rank"] for r in own]), (1, 5))
        low, high = metrics.bootstrap([r["score"] for r in own])
        table = metrics.by_kind([r["score"] for r in own], [r["answers"][0] for r in own])
        return {"top1": hits[1], "top5": hits[5], "ci95": [low, high], "n": len(own), "classes": len(self.classes),
                "by_kind": {kind: row["mean"] for kind, row in table.items()}}


class _Classifying:
    def __init__(self, task: ZeroShot, env: Env):
        self.task, self.rows = task, batch_rows(task.rows, env.mesh)
        self.embedder = Embedder(*env.parts, modality=task.modality, seq_len=env.seq_len)
        prompts = [template.replace("{}", name) for name in task.classes for template in task.templates]
        vectors = self.embedder.every_text(prompts, self.rows).astype(np.float64)
        mean = vectors.reshape(len(task.classes), len(task.templates), -1).mean(axis=1)
        self.vectors = mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def truth(self, example: Example) -> int:
        name = next(iter(answers_of(example)), "")
        if name not in self.task.classes:
            raise ConfigError(f"record {example.id!r} is of class {name!r}, which is not among the {len(self.task.classes)} classes; "
                              "add it to them")
        return self.task.classes.index(name)

    def shape(self, example: Example) -> tuple[int, ...]:
        self.truth(example)
        return ()

    def run(self, examples: Sequence[Example], shape: tuple[int, ...]) -> list[Record]:
        scores = self.embedder.media(examples).astype(np.float64) @ self.vectors.T
        right = np.eye(len(self.task.classes), dtype=bool)[[self.truth(e) for e in examples]]
        ranks = metrics.ranks(scores, right)
        return [
            {"id": e.id, "kind": e.kind, "answers": list(answers_of(e)), "prediction": self.task.classes[int(np.argmax(s))],
             "rank": int(rank), "score": float(rank < 1)}
            for e, s, rank in zip(examples, scores, ranks, strict=True)]


@config
class Perplexity(Task):
    """exp of the mean negative log-likelihood of the tokens that a stage would train, over all examples together."""

    source: str
    limit: int | None = None
    rows: int = 16

    def start(self, env: Env) -> Runner:
        return _Scoring(self, env)

    def result(self, records: Mapping[str, Sequence[Record]], env: Env) -> Record:
        own = records[""]
        nll, tokens = [r["nll"] for r in own], [r["tokens"] for r in own]
        pairs = np.stack([nll, tokens], axis=1)
        picks = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
        low, high = np.percentile(np.exp(pairs[picks, 0].sum(axis=1) / pairs[picks, 1].sum(axis=1)), [2.5, 97.5])
        return {"perplexity": metrics.perplexity(nll, tokens), "ci95": [float(low), float(high)],
                "nll": float(np.sum(nll) / np.sum(tokens)), "tokens": float(np.sum(tokens)), "n": len(own)}


class _Scoring:
    def __init__(self, task: Perplexity, env: Env):
        self.rows, self.scorer = batch_rows(task.rows, env.mesh), Scorer(*env.parts)
        self.shape = self.scorer.shape

    def run(self, examples: Sequence[Example], shape: tuple[int, ...]) -> list[Record]:
        nll, tokens = self.scorer.nll(examples, shape)
        each = zip(examples, nll.tolist(), tokens.tolist(), strict=True)
        return [{"id": e.id, "kind": e.kind, "nll": n, "tokens": t} for e, n, t in each]


# --- reading an example -------------------------------------------------------------------------------------------


def question_of(example: Example) -> str:
    """What the user says last, without its media."""
    asked = [turn for turn in example.turns if turn.role == "user"]
    return "".join(part.text for part in asked[-1].parts).strip() if asked else ""


def answers_of(example: Example) -> tuple[str, ...]:
    """The accepted answers; those of the last turn if the example names none."""
    if example.answers or not example.turns or example.turns[-1].role != "assistant":
        return example.answers
    return ("".join(part.text for part in example.turns[-1].parts).strip(),)


def media_hash(example: Example) -> str:
    """What tells the media of an example from those of others; "" without any."""
    if not example.media:
        return ""
    parts = (blob.path.encode() if blob.path else blob.data for blob in example.media)
    return hashlib.blake2b(b"|".join(hashlib.blake2b(p).digest() for p in parts), digest_size=16).hexdigest()


def _instead(own: Sequence[Blob], other: Sequence[Blob]) -> tuple[Blob, ...]:
    """As many media as `own`, of the same modalities, taken from `other` in turn."""
    lent = {kind: [b for b in other if b.kind == kind] for kind in {b.kind for b in own}}
    return tuple(lent[b.kind][i % len(lent[b.kind])] for i, b in enumerate(own))


def _blank(blob: Blob) -> Blob:
    """A grey image of the same size; other modalities stay."""
    if blob.kind != "image":
        return blob
    height, width = image_size(read_blob(blob))
    out = io.BytesIO()
    Image.new("RGB", (width, height), BLANK).save(out, "PNG")
    return Blob(kind="image", data=out.getvalue())


def _mean(records: Sequence[Record]) -> float:
    return float(np.mean([r["score"] for r in records]))


def _pack(x: np.ndarray) -> str:
    return base64.b64encode(np.asarray(x, "<f4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
