"""The doors: what users bring (tensors, numpy and pandas arrays, lists, scalars) turned into checked tensors and numbers.

Every function names the argument, says what was wanted and what came, and raises InvalidArgumentError alone. Integers of any width come
out as int64, so that an index means the same whatever its type; floats keep their own precision.
"""

import math
import numbers
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError

Shape = Sequence[int | str | EllipsisType]  # a number is that size, a letter any size, a leading ... any dimensions
_LARGEST = (1 << 63) - 1
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch neither compares nor indexes with these


def tensor(name: str, value: Any, wanted: str = "numbers") -> Tensor:
    """Whatever holds real numbers, as a tensor: torch, numpy and pandas objects, nested lists, Python numbers.

    None and pandas' NA become NaN. What is a tensor already keeps its type, memory and graph.

    Raises:
        InvalidArgumentError: anything else, complex numbers, or an integer beyond int64.

    >>> tensor("ids", np.array([1, 2], dtype=np.uint16)), tensor("outcome", [1, None])
    (tensor([1, 2]), tensor([1., nan], dtype=torch.float64))
    """
    if isinstance(value, Tensor):
        return _plain(name, value, wanted)
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        parts = [tensor(f"{name}[{place}]", item, wanted) for place, item in enumerate(value)]
        if len({part.shape for part in parts}) > 1:
            raise InvalidArgumentError(f"{name} must be {wanted} of one shape; got {[tuple(p.shape) for p in parts]}")
        return torch.stack([part.to(parts[0].device) for part in parts])
    try:
        array = np.asarray(value)
    except Exception as error:  # what __array__ of foreign objects raises is theirs to choose
        raise InvalidArgumentError(f"{name} must be {wanted}; got {described(value)}: {error}") from error
    if array.dtype.kind == "O":
        array = _from_objects(name, array, wanted)
    if array.dtype.kind not in "biuf":
        raise InvalidArgumentError(f"{name} must be {wanted}; got {described(value)}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        _require_int64(name, array, wanted)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)
    if not array.dtype.isnative or not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))  # a copy
    return torch.from_numpy(array)


def integers(
    name: str,
    value: Any,
    shape: Shape | None = None,
    *,
    low: int | None = None,
    high: int | None = None,
) -> Tensor:  # int64
    """Integers of any type as int64, each in [low, high]; no booleans and no floats, also not those without a fraction.

    Raises:
        InvalidArgumentError: another type, shape or value.

    >>> integers("labels", torch.tensor([1, 2], dtype=torch.uint8), ("N",), low=0, high=2)
    tensor([1, 2])
    """
    wanted = "integers" + ("" if shape is None else f" of shape {written(shape)}")
    found = tensor(name, value, wanted)
    if is_empty_list(value):
        found = found.to(torch.int64)
    if found.is_floating_point() or found.dtype == torch.bool or not fits(found, shape):
        raise InvalidArgumentError(f"{name} must be {wanted}; got {described(value)}")
    found = found.to(torch.int64)
    if found.numel() and (low is not None or high is not None):
        least, most = (int(end) for end in found.aminmax())
        if (low is not None and least < low) or (high is not None and most > high):
            bounds = (
                f"be at least {low}"
                if high is None
                else f"be at most {high}"
                if low is None
                else f"lie in [{low}, {high}]"
            )
            raise InvalidArgumentError(f"{name} must {bounds}; got values from {least} to {most}")
    return found


def floats(name: str, value: Any, shape: Shape | None = None, *, finite: bool = False) -> Tensor:
    """Real numbers as a floating tensor: floats keep their type, integers and booleans become float64.

    Raises:
        InvalidArgumentError: another type or shape, or NaN or inf where they must be finite.
    """
    wanted = "numbers" + ("" if shape is None else f" of shape {written(shape)}")
    found = tensor(name, value, wanted)
    if not fits(found, shape):
        raise InvalidArgumentError(f"{name} must be {wanted}; got {described(value)}")
    if not found.is_floating_point():
        found = found.to(torch.float64)
    elif found.dtype.itemsize == 1:  # float8, which torch neither compares nor adds
        found = found.float()
    if finite and not bool(found.isfinite().all()):
        where = first(~found.isfinite())
        raise InvalidArgumentError(f"{name} must be finite; got {found[where].item()} at {where}")
    return found


def outcomes(name: str, value: Any, shape: Shape | None = None) -> Tensor:
    """Competence signals: each in [0, 1], or NaN where not observed.

    Raises:
        InvalidArgumentError: another type or shape, or a value outside, infinite ones included.

    >>> outcomes("outcome", [True, False])
    tensor([1., 0.], dtype=torch.float64)
    """
    found = floats(name, value, shape)
    outside = (found < 0) | (found > 1)  # False for NaN
    if bool(outside.any()):
        where = first(outside)
        raise InvalidArgumentError(
            f"{name} must lie in [0, 1] or be NaN (not observed); got {found[where].item():g} at {where}"
        )
    return found


def number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
) -> float:
    """One real number, Python's, numpy's or torch's, within bounds; NaN is never within.

    Raises:
        InvalidArgumentError: anything else, booleans included.

    >>> number("threshold", np.float32(0.5), least=0, most=1)
    0.5
    """
    found = real(value)
    if found is None or not (least <= found <= most and (finite is False or math.isfinite(found))):
        inside = False
    else:
        inside = (above < found or above == -math.inf) and (found < below or below == math.inf)
    if found is None or not inside:
        wanted = _range(least, most, above, below, finite)
        raise InvalidArgumentError(f"{name} must {wanted}; got {described(value)}")
    return found


def count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """One integer, Python's, numpy's or torch's, of at least ``least``.

    Raises:
        InvalidArgumentError: anything else, booleans and floats without a fraction included.

    >>> count("num_experts", np.int8(4))
    4
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 and not _is_meta(value):
        value = value.item()
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bounds = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise InvalidArgumentError(f"{name} must be an integer {bounds}; got {described(value)}")
    return int(value)


def is_empty_list(value: Any) -> bool:
    """Whether this is a list without values, which has no type of its own."""
    return isinstance(value, (list, tuple)) and all(is_empty_list(item) for item in value)


def is_index(value: Any, size: int) -> bool:
    """Whether this is one integer, Python's, numpy's or torch's, in [0, size); no boolean."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.item() if value.ndim == 0 and not _is_meta(value) else None
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) < size


def real(value: Any) -> float | None:
    """One real number as a float; None for anything else, booleans included."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.item() if value.ndim == 0 and not _is_meta(value) else None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a Python integer beyond the largest float
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _is_meta(value: Tensor | np.ndarray) -> bool:
    """Whether this has a shape and no values."""
    return isinstance(value, Tensor) and value.is_meta


def fits(found: Tensor, shape: Shape | None) -> bool:
    """Whether a tensor has this shape."""
    if shape is None:
        return True
    sizes, wanted = tuple(found.shape), tuple(shape)
    if wanted and wanted[0] is ...:
        wanted = wanted[1:]
        sizes = sizes[len(sizes) - len(wanted) :] if len(sizes) >= len(wanted) else ()
    return len(sizes) == len(wanted) and all(isinstance(w, str) or w == s for w, s in zip(wanted, sizes, strict=True))


def written(shape: Shape) -> str:
    """A shape as the errors write it.

    >>> written((..., "N", 3)), written((4,))
    ('(..., N, 3)', '(4,)')
    """
    parts = ["..." if size is ... else str(size) for size in shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def described(value: Any) -> str:
    """What came, briefly: type and shape of an array, else the value itself.

    >>> described(torch.ones(2, 3)), described("good")
    ('torch.float32 of shape (2, 3)', "'good'")
    """
    if hasattr(value, "dtype") and hasattr(value, "shape") and len(value.shape) > 0:
        return f"{value.dtype} of shape {tuple(value.shape)}"
    text = repr(value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:60]}..."


def first(where: Tensor) -> tuple[int, ...]:
    """The place of the first True."""
    return tuple(int(place) for place in where.nonzero()[0])


def _plain(name: str, value: Tensor, wanted: str) -> Tensor:
    if value.is_complex() or value.is_quantized or value.is_nested or value.layout != torch.strided or value.is_meta:
        kind = ", without values (device meta)" if value.is_meta else ""
        kind = kind if value.layout == torch.strided else f", {value.layout}"
        raise InvalidArgumentError(f"{name} must be {wanted}; got {value.dtype}{kind} of shape {tuple(value.shape)}")
    if value.dtype not in _UNSIGNED:
        return value
    if value.dtype == torch.uint64 and bool((value.view(torch.int64) < 0).any()):
        _require_int64(name, value.cpu().numpy(), wanted)
    return value.to(torch.int64)


def _require_int64(name: str, array: np.ndarray, wanted: str) -> None:
    if array.size and int(array.max()) > _LARGEST:
        raise InvalidArgumentError(f"{name} must be {wanted} of at most {_LARGEST}; got {int(array.max())}")


def _from_objects(name: str, array: np.ndarray, wanted: str) -> np.ndarray:
    flat: list[Any] = []
    for item in array.reshape(-1):
        if item is None or type(item).__name__ == "NAType":
            flat.append(math.nan)
        elif isinstance(item, (numbers.Real, np.bool_)):
            flat.append(item)
        else:
            raise InvalidArgumentError(f"{name} must be {wanted}; got {described(item)} among its values")
    if flat and all(isinstance(item, numbers.Integral) for item in flat):
        wrong = next((item for item in flat if not -_LARGEST - 1 <= int(item) <= _LARGEST), None)
        if wrong is not None:
            raise InvalidArgumentError(f"{name} must be {wanted} of at most {_LARGEST} in size; got {wrong}")
        kind = np.bool_ if all(isinstance(item, (bool, np.bool_)) for item in flat) else np.int64
        return np.array(flat, dtype=kind).reshape(array.shape)
    return np.array([float(item) for item in flat], dtype=np.float64).reshape(array.shape)


def _range(least: float, most: float, above: float, below: float, finite: bool) -> str:
    """In words: ``lie in [0, 1)``, ``be at least 0 and finite``, ``be positive and finite``."""
    if max(least, above) > -math.inf and min(most, below) < math.inf:
        low = f"({above:g}" if above >= least else f"[{least:g}"
        return f"lie in {low}, {f'{below:g})' if below <= most else f'{most:g}]'}"
    bounds = {f"at least {least:g}": least, f"at most {most:g}": most, f"below {below:g}": below}
    bounds["positive" if above == 0 else f"above {above:g}"] = above
    words = [text for text, bound in bounds.items() if not math.isinf(bound)]
    return f"be {' and '.join([*words, *(['finite'] if finite else [])]) or 'a number'}"
