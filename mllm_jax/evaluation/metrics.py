"""Metrics as pure functions on what a model answered; numpy, no device.

All of them are means over examples or ranks in one pool, computed once from the merged answers of all hosts.
Ties never help: a wrong candidate with the same score as the right one stands before it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np


def normalise(answer: str) -> str:
    """What exact match compares: lower case, blanks collapsed, without one full stop at the end.

    No punctuation, article or sign inside is touched, so "-3" is not "3" and "3.5" is not "35".
    """
    text = " ".join(answer.lower().split())
    return text[:-1].rstrip() if text.endswith(".") else text


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction equals any accepted answer after `normalise`, else 0."""
    return float(normalise(prediction) in {normalise(a) for a in answers})


def by_kind(scores: Iterable[float], kinds: Iterable[str]) -> dict[str, dict[str, float]]:
    """{kind: {"mean", "n", "low", "high"}}, kinds sorted; low and high are the 95 % interval of `bootstrap`."""
    groups: dict[str, list[float]] = {}
    for score, kind in zip(scores, kinds, strict=True):
        groups.setdefault(kind, []).append(score)
    out = {}
    for kind, values in sorted(groups.items()):
        low, high = bootstrap(values)
        out[kind] = {"mean": float(np.mean(values)), "n": len(values), "low": low, "high": high}
    return out


def most_frequent(kinds_answers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{kind: its most frequent answer}, the alphabetically first where several are."""
    counts: dict[str, Counter] = {}
    for kind, answer in kinds_answers:
        counts.setdefault(kind, Counter())[normalise(answer)] += 1
    return {kind: min(c, key=lambda a: (-c[a], a)) for kind, c in counts.items()}


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, list]:
    """Counts of (truth, prediction) as {"labels": truths sorted, "counts": [[n]]}.

    Row = truth, column = prediction; the last column is for predictions that are nobody's truth.
    """
    pairs = [(normalise(truth), normalise(prediction)) for truth, prediction in pairs]
    labels = sorted({truth for truth, _ in pairs}, key=lambda x: (len(x), x) if x.isdigit() else (1 << 30, x))
    column = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for truth, prediction in pairs:
        counts[column[truth], column.get(prediction, len(labels))] += 1
    return {"labels": labels, "counts": counts.tolist()}


def ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """i64[q]: how many wrong candidates stand before the best right one of each query.

    f[q c], bool[q c].  A tie, or a score that is not a number, counts against the query.

    Raises:
      ValueError: a query without a right candidate.
    """
    if not relevant.any(axis=1).all():
        raise ValueError(f"query {int(np.flatnonzero(~relevant.any(axis=1))[0])} has no right candidate")
    best = np.where(relevant, np.nan_to_num(scores, nan=-np.inf), -np.inf).max(axis=1, keepdims=True)
    return np.sum(~relevant & ~(scores < best), axis=1)


def recall(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """{k: the part of the queries whose best right candidate is among the first k}."""
    return {k: float(np.mean(np.asarray(ranks) < k)) for k in ks}


def retrieval(images: np.ndarray, texts: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Recall in both directions, {"image_to_text_r1", ..., "text_to_image_r10"}.

    Args:
      images: unit vectors f[i d]; where an image has several, f[i n d], that most like a text counts.
      texts: unit vectors f[t d]; an image may have several texts.
      relevant: bool[i t], whether text t is right for image i.
    """
    several = images.astype(np.float64).reshape(len(images), -1, texts.shape[1])
    scores = np.max(several @ texts.astype(np.float64).T, axis=1)
    out = {}
    for name, r in (("image_to_text", ranks(scores, relevant)), ("text_to_image", ranks(scores.T, relevant.T))):
        out |= {f"{name}_r{k}": v for k, v in recall(r).items()}
    return out


def perplexity(nll: Iterable[float], tokens: Iterable[float]) -> float:
    """exp of the mean negative log-likelihood of a token, over all tokens of all examples together."""
    return float(np.exp(np.sum(np.asarray(list(nll), np.float64)) / np.sum(np.asarray(list(tokens), np.float64))))


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray] | None = None, *, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic (by default the mean) over n resamples of the examples.

    `statistic` maps resamples f[n examples] to f[n].  The same values give the same interval.
    """
    values = np.asarray(values, np.float64)
    statistic = statistic or (lambda x: x.mean(axis=1))
    picks = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.percentile(statistic(values[picks]), [2.5, 97.5])
    return float(low), float(high)


def derangement(keys: Sequence[Hashable], groups: Sequence[Hashable] | None = None, *, seed: int = 0) -> dict[int, int]:
    """For each index another one of its group with a different key, in a random cycle of the keys.

    Examples with equal keys (the same images) never get one another's.  Indices whose group has one key
    only are left out; the caller says what becomes of them.
    """
    groups = [None] * len(keys) if groups is None else groups
    first: dict[Hashable, dict[Hashable, int]] = {}
    for i, (key, group) in enumerate(zip(keys, groups, strict=True)):
        first.setdefault(group, {}).setdefault(key, i)
    following: Mapping = {}
    for group, members in first.items():
        order = [list(members)[j] for j in np.random.default_rng(seed).permutation(len(members))]
        following[group] = dict(zip(order, order[1:] + order[:1]))
    return {i: first[g][following[g][k]] for i, (k, g) in enumerate(zip(keys, groups)) if following[g][k] != k}
