"""The doors: one answer for every type that holds the value, our own error for everything else."""

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from moe_posterior.checks.validation import count, floats, integers, number, outcomes, tensor
from moe_posterior.errors import InvalidArgumentError

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
TORCH_INTEGERS = [getattr(torch, np.dtype(kind).name) for kind in INTEGERS]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NOT_NUMBERS = ["good", b"good", object(), {"a": 1}, {1, 2}, 1j, [1j], torch.ones(2) + 1j, ["1"], [[1], [1, 2]], Decimal]
NOT_NUMBERS += [np.array(["2020-01-01"], dtype="datetime64[D]"), torch.ones(2).to_sparse(), print]


def in_every_form(values: list[int]) -> list[Any]:
    arrays = [np.array(values, dtype=kind) for kind in INTEGERS]
    forms: list[Any] = [values, tuple(values), np.array(values, dtype=">i4"), np.array(values, dtype=object)]
    forms += arrays + [torch.tensor(values, dtype=kind) for kind in TORCH_INTEGERS]
    forms += [np.array(values[::-1])[::-1], np.repeat(values, 2)[::2], [np.int8(v) for v in values]]
    forms += [torch.tensor(values).repeat_interleave(2)[::2], [torch.tensor(v) for v in values]]
    read_only = np.array(values)
    read_only.flags.writeable = False
    return [*forms, read_only]


@pytest.mark.parametrize(
    "given", in_every_form([3, 0, 100]), ids=lambda g: f"{type(g).__name__}-{getattr(g, 'dtype', '')}"
)
def test_integers_of_every_type_come_out_alike(given: Any) -> None:
    found = integers("ids", given, ("N",), low=0, high=100)
    assert found.dtype == torch.int64
    assert found.tolist() == [3, 0, 100]


def test_pandas_columns_are_numbers_and_their_na_is_nan() -> None:
    pandas = pytest.importorskip("pandas")
    for kind in ("int64", "Int64", "uint8", "UInt16"):
        assert integers("ids", pandas.Series([3, 0], dtype=kind), (2,)).tolist() == [3, 0]
    for column in (pandas.Series([1, None], dtype="Int64"), pandas.Series([True, None], dtype="boolean")):
        found = outcomes("outcome", column)
        assert found[0] == 1
        assert found[1].isnan()
    assert floats("x", pandas.DataFrame({"a": [1.0], "b": [2]})).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("given", [[2**63], [2**64 - 1], [-(2**63) - 1], [10**30]])
def test_an_integer_beyond_int64_is_refused_in_every_form(given: list[int]) -> None:
    forms: list[Any] = [given, np.array(given, dtype=object)]
    if 0 <= given[0] < 2**64:
        forms += [np.array(given, dtype=np.uint64), torch.tensor(given, dtype=torch.uint64)]
    for form in forms:
        with pytest.raises(InvalidArgumentError, match="ids must be"):
            integers("ids", form)


@pytest.mark.parametrize("given", [[1.0], [True], torch.tensor([1.0]), np.array([True]), [math.nan], [None], 1.5])
def test_floats_and_booleans_are_no_integers(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="ids must be integers"):
        integers("ids", given)


@pytest.mark.parametrize("given", NOT_NUMBERS)
def test_what_is_no_number_is_refused_by_name(given: Any) -> None:
    for read in (tensor, integers, floats, outcomes, number, count):
        with pytest.raises(InvalidArgumentError, match=r"^thing"):
            read("thing", given)


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_keep_their_type_and_their_graph(kind: torch.dtype) -> None:
    given = torch.tensor([0.0, 1.0], dtype=kind, requires_grad=True)
    assert floats("x", given) is given
    assert outcomes("x", given) is given


@pytest.mark.parametrize("kind", [*FLOATS, torch.float8_e4m3fn, *TORCH_INTEGERS, torch.bool])
def test_outcomes_of_every_type_that_holds_zero_and_one_are_alike(kind: torch.dtype) -> None:
    assert outcomes("outcome", torch.tensor([0, 1]).to(kind)).double().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, 1.5, -0.5])
def test_an_outcome_outside_its_range_or_infinite_is_refused_with_its_place(wrong: float) -> None:
    for kind in FLOATS:
        with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\] or be NaN .* at \(0, 1\)"):
            outcomes("outcome", torch.tensor([[0.5, wrong]], dtype=kind))


def test_negative_zero_is_a_failure_and_no_error() -> None:
    assert outcomes("outcome", [-0.0]).item() == 0


@pytest.mark.parametrize("given", [3, np.int8(3), np.uint64(3), torch.tensor(3), np.array(3), 3.0, np.float16(3)])
def test_one_number_of_every_type_is_the_same_number(given: Any) -> None:
    assert number("x", given, least=0, most=3) == 3
    if not isinstance(given, (float, np.float16)):
        assert count("x", given) == 3


@pytest.mark.parametrize(
    "given", [math.nan, math.inf, -1, True, None, "1", torch.ones(1), 10**400, torch.tensor(math.nan)]
)
def test_a_number_out_of_bounds_or_not_finite_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^x must be at least 0 and finite; got"):
        number("x", given, least=0)


def test_a_bound_can_be_open() -> None:
    for value in (0, 1):
        with pytest.raises(InvalidArgumentError, match=r"level must lie in \(0, 1\)"):
            number("level", value, above=0, below=1)
    assert number("level", 0.5, above=0, below=1) == 0.5
    assert number("rho", math.inf, least=0, finite=False) == math.inf


def test_empty_lists_have_any_type() -> None:
    assert integers("ids", []).dtype == torch.int64
    assert len(floats("x", [])) == 0


@pytest.mark.parametrize(
    ("shape", "fits"), [((2, 3), True), (("N", 3), True), ((..., 3), True), ((3,), False), ((..., 2), False)]
)
def test_a_shape_is_sizes_letters_or_leading_dots(shape: Any, fits: bool) -> None:
    if fits:
        assert floats("x", torch.ones(2, 3), shape).shape == (2, 3)
    else:
        with pytest.raises(InvalidArgumentError, match=r"of shape \(.*got torch.float32 of shape \(2, 3\)"):
            floats("x", torch.ones(2, 3), shape)
