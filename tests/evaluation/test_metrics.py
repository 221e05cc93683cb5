"""Metrics against hand values, brute force and scikit-learn."""

import numpy as np
import pytest

from mllm_jax.evaluation.metrics import (
    bootstrap,
    by_kind,
    confusion,
    derangement,
    exact_match,
    most_frequent,
    normalise,
    perplexity,
    ranks,
    recall,
    retrieval,
)


@pytest.mark.parametrize(
    "text, want",
    [
        ("Top  Left", "top left"),
        (" yes. ", "yes"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ("A cat .", "a cat"),
        (".", ""),
        ("1 2\n3", "1 2 3"),
    ],
)
def test_normalise(text, want):
    assert normalise(text) == want


def test_any_accepted_answer_matches():
    assert exact_match("Cat.", ("dog", "cat")) == 1
    assert exact_match("cats", ("dog", "cat")) == 0
    assert exact_match("", ("cat",)) == 0


def test_kinds_are_means_with_counts():
    table = by_kind([1, 0, 1, 1], ["b", "a", "b", "a"])
    assert list(table) == ["a", "b"]
    assert (table["a"]["mean"], table["a"]["n"], table["b"]["mean"]) == (0.5, 2, 1.0)
    assert table["b"]["low"] == table["b"]["high"] == 1.0


def test_the_most_frequent_answer_of_each_kind():
    assert most_frequent([("n", "2"), ("n", "1"), ("n", "2"), ("c", "red"), ("c", "Blue")]) == {"n": "2", "c": "blue"}


def test_confusion_is_that_of_sklearn():
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 11, 300).astype(str), rng.integers(0, 11, 300).astype(str)
    got = confusion(zip(truth, guess, strict=True))
    assert got["labels"] == [str(i) for i in range(11)]
    np.testing.assert_array_equal(np.array(got["counts"])[:, :-1], confusion_matrix(truth, guess, labels=got["labels"]))
    assert confusion([("1", "seven"), ("2", "1")]) == {"labels": ["1", "2"], "counts": [[0, 0, 1], [1, 0, 0]]}


def _brute_ranks(scores, relevant):
    """Sort the candidates, the wrong ones first among equals, and count up to the first right one."""
    out = []
    for s, r in zip(scores, relevant, strict=True):
        order = sorted(range(len(s)), key=lambda j: (-s[j], r[j]))
        out.append(next(k for k, j in enumerate(order) if r[j]))
    return np.array(out)


def test_ranks_are_those_of_sorting_with_ties_against_us():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (50, 20)).astype(float)  # many ties
    relevant = rng.random((50, 20)) < 0.15
    relevant[np.arange(50), rng.integers(0, 20, 50)] = True
    np.testing.assert_array_equal(ranks(scores, relevant), _brute_ranks(scores, relevant))


def test_a_constant_model_finds_nothing():
    images, texts = np.ones((20, 4)), np.ones((20, 4))
    assert set(retrieval(images, texts, np.eye(20, dtype=bool)).values()) == {0.0}


def test_a_score_that_is_no_number_is_a_miss():
    assert ranks(np.full((1, 3), np.nan), np.array([[True, False, False]])).tolist() == [2]


def test_a_query_without_a_right_answer_is_an_error():
    with pytest.raises(ValueError, match="query 1"):
        ranks(np.zeros((2, 2)), np.array([[True, False], [False, False]]))


def test_retrieval_with_several_captions_is_brute_force():
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    images = unit(rng.normal(size=(30, 8)))
    owner = np.repeat(np.arange(30), 3)
    texts = unit(images[owner] + rng.normal(0, 0.5, (90, 8)))
    got = retrieval(images, texts, owner[None] == np.arange(30)[:, None])
    scores = images @ texts.T
    i2t = [min(np.flatnonzero(owner[np.argsort(-scores[i])] == i)) for i in range(30)]
    t2i = [int(np.flatnonzero(np.argsort(-scores[:, t]) == owner[t])[0]) for t in range(90)]
    for k in (1, 5, 10):
        assert got[f"image_to_text_r{k}"] == np.mean(np.array(i2t) < k)
        assert got[f"text_to_image_r{k}"] == np.mean(np.array(t2i) < k)
    assert 0.2 < got["text_to_image_r1"] < 1


def test_top_k_accuracy_is_that_of_sklearn():
    from sklearn.metrics import top_k_accuracy_score

    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(200, 12)), rng.integers(0, 12, 200)
    got = recall(ranks(scores, np.eye(12, dtype=bool)[truth]), (1, 5))
    for k in (1, 5):
        assert got[k] == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=range(12)))


def test_perplexity_weighs_tokens_not_examples():
    assert perplexity([3.0, 1.0], [1, 3]) == pytest.approx(np.e)


def test_the_interval_is_that_of_scipy():
    from scipy import stats

    values = np.random.default_rng(0).random(200)
    low, high = bootstrap(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Both are Monte Carlo; the ends have a standard error of about 3 % of the width.
    assert abs(low - theirs.low) < 0.15 * (high - low) and abs(high - theirs.high) < 0.15 * (high - low)
    assert bootstrap(values) == (low, high)


def test_a_derangement_leaves_nobody_its_own():
    keys = ["a", "b", "a", "c", "d", "b"]
    other = derangement(keys)
    assert sorted(other) == list(range(6))
    assert all(keys[i] != keys[j] for i, j in other.items())
    assert derangement(["a", "a"]) == {}
    apart = derangement(keys, ["x", "x", "x", "y", "y", "x"])
    assert all((i in (3, 4)) == (j in (3, 4)) for i, j in apart.items()) and len(apart) == 6
