"""Random choices of rows in one pass fall on the same ids however the rows come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_posterior.evaluation.columns import Columns
from moe_posterior.evaluation.priority import Smallest, hashed, mixed, priorities
from moe_posterior.evaluation.running import Running


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200), st.integers(1, 20), st.integers(1, 50))
def test_the_smallest_numbers_are_those_of_a_sort(numbers: list[int], size: int, step: int) -> None:
    smallest = Smallest(size)
    every = np.array(numbers, dtype=np.uint64)
    for start in range(0, len(every), step):
        smallest.offer(every[start : start + step])
    assert smallest.found().tolist() == sorted(numbers)[:size]


def test_every_row_is_chosen_equally_often() -> None:
    chosen = np.zeros(100)
    for seed in range(2000):
        chosen[np.argsort(priorities(np.arange(100, dtype=np.uint64), seed, "sample"))[:10]] += 1
    assert chosen.sum() == 20_000
    assert np.abs(chosen - 200).max() < 5 * (200 * 0.9) ** 0.5


def test_mixing_is_one_to_one() -> None:
    assert len(np.unique(mixed(np.arange(100_000, dtype=np.uint64)))) == 100_000


def test_ids_are_the_same_as_numbers_and_as_texts() -> None:
    assert (hashed(np.array(["3", "-4"])) == hashed(np.array([3, -4]))).all()
    assert (
        hashed(np.array([3.0, 0.5])) == hashed(["3", "0.5"])
    ).all()  # a gap in a column of integers makes floats of them
    assert len(np.unique(hashed(["3", "03", "three", "3.0"]))) == 4


@pytest.mark.parametrize("step", [1_000, 65_536, 70_001])
def test_sums_and_sample_do_not_depend_on_the_pieces(step: int) -> None:
    draw = np.random.default_rng(0)
    n = 140_000
    columns = Columns(draw.uniform(size=n), draw.integers(0, 2, n).astype(float), groups={"a": draw.integers(0, 3, n)})
    ids = np.arange(n, dtype=np.uint64)
    found = []
    for size in (step, n):
        running = Running(1_000, 15, seed=0)
        for start in range(0, n, size):
            running.add(columns[start : start + size], ids[start : start + size])
        found.append((running, running.finish()))
    (one, (rows, kept)), (other, (expected, chosen)) = found
    assert (kept == chosen).all()
    assert (rows.probs == expected.probs).all()
    assert one.overall.moments.equal(other.overall.moments)
    assert one.overall.scores.equal(other.overall.scores)
    assert all(a.moments.equal(b.moments) for a, b in zip(one.totals("a"), other.totals("a"), strict=True))
    assert one.n == n
    assert one.overall.n == n
