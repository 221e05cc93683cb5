"""Programs for TPU chips hold no whole vocabulary and no whole batch: seen in what the compiler made of small ones."""

import math

import pytest

pytest.importorskip("libtpu")

from benchmarks.loss_memory import head, pairs  # noqa: E402
from mllm_jax.objectives import InfoNCE  # noqa: E402
from mllm_jax.plan.hlo import arrays  # noqa: E402
from mllm_jax.plan.topology import not_kept  # noqa: E402


def compiled(lowered) -> tuple[int, int]:
    """(numbers of the largest array in the program, bytes of temporaries), of a chip."""
    with not_kept():
        program = lowered.compile()
    shapes = (a for line in program.as_text().splitlines() if " = " in line for a in arrays(line.split(" = ")[1].split("(")[0]))
    return max(math.prod(a.dims) for a in shapes), program.memory_analysis().temp_size_in_bytes


def test_no_chip_has_the_whole_matrix_or_all_logits():
    width, tokens, positions = 1024, 65_536, 2048
    largest, temporaries = compiled(head("v5e:2x2", None, tokens, width, positions))
    # What lies on a chip by itself is its quarter of the matrix; a block of logits is as large.
    assert largest <= width * tokens // 4
    assert temporaries < 4 * width * tokens


def test_no_chip_has_all_rows_or_all_pairs():
    """A visitor's rows are as many as a chip's own, and a block of pairs is smaller than those of both."""
    largest, temporaries = compiled(pairs("v5e:2x4", InfoNCE(), 4096, 128))
    assert largest < 4096 * 4096
    assert temporaries < 4 * 4096 * 4096
