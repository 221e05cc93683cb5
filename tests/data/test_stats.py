"""The recommendation holds for the data that it was made from."""

from dataclasses import replace

import numpy as np

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.pack import row_spec
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.stats import fill, histogram, measure, mixed, recommend, recommend_trained, report
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.types import Example, Part, Turn

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=16, grid=4, depth=1)
TOWERS = {"image": TowerConfig(view=Square(size=64), encoder=VIT, connector=MLPConfig())}
TEMPLATE = Template("plain", load_tokenizer("bytes"))


def text(i: int, length: int) -> Example:
    turns = (Turn(role="user", parts=(Part(text="q"),)), Turn(role="assistant", parts=(Part(text="x" * length),)))
    return Example(id=str(i), turns=turns)


def measured(name, source, weight=1.0, limit=200):
    return measure(name, source, weight, template=TEMPLATE, towers=TOWERS, seq_len=128, limit=limit)


def test_the_recommended_row_drops_little_and_fills_well():
    rng = np.random.default_rng(0)
    texts = measured("text", [text(i, n) for i, n in enumerate(rng.integers(1, 400, 300))], limit=300)
    sample = mixed([measured("shapes", Shapes()), texts])
    seq_len, items = recommend(sample, TOWERS)
    dropped, filled, _ = fill(sample, row_spec(seq_len, items, TOWERS, 0))
    assert dropped < 0.03 and filled > 0.9
    # Room for a single image in rows of that length would leave them half empty.
    assert fill(sample, row_spec(seq_len, {"image": 1}, TOWERS, 0))[1] < filled - 0.2


def test_a_limit_of_trained_positions_costs_nothing_that_shows():
    """Questions of 60 letters, answers of a few: a limit is advised that leaves rows as full; where all is answer, none is."""
    question = Part(text="q" * 60)
    ask = lambda i, n: Example(id=str(i), turns=(
        Turn(role="user", parts=(question,)), Turn(role="assistant", parts=(Part(text="x" * n),))))
    sample = list(measured("asked", [ask(i, 1 + i % 17) for i in range(200)]).sequences)
    spec = row_spec(512, {}, {}, 0)
    most = recommend_trained(sample, spec)
    assert 64 <= most <= 128
    dropped, filled, _ = fill(sample, replace(spec, trained=most))
    assert dropped == 0 and filled >= 0.99 * fill(sample, spec)[1]
    assert recommend_trained(list(measured("told", [text(i, 200) for i in range(50)]).sequences), spec) is None


def test_a_few_very_long_examples_do_not_decide_the_row():
    sample = mixed([measured("text", [text(i, 3000 if i == 0 else 50) for i in range(100)])])
    assert recommend(sample, {})[0] <= 256


def test_fill_is_counted_by_hand():
    # Sequences of 10 positions (begin, q, new line, six letters, end): three fit into 32, so 4 rows for 10.
    sample = list(measured("text", [text(i, 6) for i in range(10)]).sequences)
    assert fill(sample, row_spec(32, {}, {}, 0)) == (0.0, 100 / 128, 2.5)
    assert fill(sample, row_spec(9, {}, {}, 0)) == (1.0, 0.0, 0.0)


def test_sources_are_mixed_by_weight():
    a, b = measured("a", [text(i, 1) for i in range(60)], 3.0), measured("b", [text(i, 9) for i in range(60)], 1.0)
    lengths = [len(s) for s in mixed([a, b])]
    assert lengths.count(5) == 60 and lengths.count(13) == 20
    assert lengths[:20].count(13) == 5                      # interleaved, not one after the other


def test_bad_examples_are_counted_with_the_first_message():
    one = measured("t", [text(0, 0), text(1, 0), text(2, 5)])
    assert one.bad == {"empty_answer": 2} and "record '0' is bad" in one.first_bad["empty_answer"]
    lines = "\n".join(report([one], TOWERS, seq_len=64, items={}, pad=0))
    assert "bad: 2 x empty_answer, for example record '0'" in lines


def test_every_value_is_in_the_histogram():
    values = [1, 1, 2, 3, 50, 900]
    rows = [line.split() for line in list(histogram("x", values))[1:]]
    assert sum(int(count) for _, count, *_ in rows) == len(values)


def test_pairs_are_not_to_be_packed():
    towers = {"image": TowerConfig(view=Square(size=64), encoder=VIT, route="pool")}
    siglip = Template("siglip", TEMPLATE.tokenizer)
    one = measure("shapes", Shapes(8), 1.0, template=siglip, towers=towers, seq_len=64)
    assert "nothing to pack" in list(report([one], towers, seq_len=64, items={}, pad=0))[-1]
