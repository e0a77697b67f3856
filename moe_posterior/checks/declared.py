"""Signatures enforced on entry: an argument of another type than declared is refused by name before anything is computed.

Only types; what a value must be within its type (a shape, a range) is for the function to say. Under torch.compile nothing is checked.
"""

import functools
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from moe_posterior.checks.validation import described, is_empty_list, real, tensor
from moe_posterior.errors import InvalidArgumentError

P = ParamSpec("P")
T = TypeVar("T")
Reader = Callable[[str, Any], Any]  # argument's name and value -> the value to use
_INT64 = 1 << 63


def as_declared(function: Callable[P, T]) -> Callable[P, T]:
    """Read every argument as its annotation says: numbers and tensors of any library become Python's and torch's.

    For functions that are called once a batch or more seldom: it costs a few microseconds. An annotation that says nothing of one
    argument alone (``Any``, a type variable) lets everything through.

    Raises:
        InvalidArgumentError: from the function made, for an argument of another type.

    >>> @as_declared
    ... def half(size: int) -> float:
    ...     return size / 2
    >>> half(np.int8(3))
    1.5
    >>> half("3")
    Traceback (most recent call last):
    ...
    moe_posterior.errors.InvalidArgumentError: size must be an integer; got '3'
    """
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]

    @functools.cache
    def readers() -> dict[str, Reader]:  # late: an annotation may name the class that is being defined
        hints = typing.get_type_hints(function)
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return {name: reader for name in known if name in hints and (reader := _reader(hints[name])) is not None}

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        read = readers()
        given = [read[n](n, value) if n in read else value for n, value in zip(names, args, strict=False)]
        named = {name: read[name](name, value) if name in read else value for name, value in kwargs.items()}
        return function(*given, *args[len(names) :], **named)

    return cast(Callable[P, T], door)


def _reader(hint: Any) -> Reader | None:
    """How to read a value of this annotation; None for one that says nothing."""
    known: dict[Any, Reader] = {int: _integer, float: _real, bool: _flag, Tensor: _tensor}
    origin = typing.get_origin(hint)
    if hint in known:
        return known[hint]
    if origin is Literal:
        return functools.partial(_one_of, typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return _union(typing.get_args(hint))
    kind = origin or hint
    if hint is Any or not isinstance(kind, type) or kind is object or getattr(kind, "_is_protocol", False):
        return None
    return functools.partial(_instance, (kind,))


def _union(hints: tuple[Any, ...]) -> Reader | None:
    """None where it is allowed, else the one reader that fits, else one of several classes."""
    parts = [hint for hint in hints if hint is not types.NoneType]
    if len(parts) == 1:
        inner = _reader(parts[0])
    else:
        kinds = [typing.get_origin(part) or part for part in parts]
        if not all(isinstance(kind, type) for kind in kinds) or {int, float, bool, Tensor} & set(kinds):
            return None
        inner = functools.partial(_instance, tuple(kinds))
    if inner is None or len(parts) == len(hints):
        return inner

    def optional(name: str, value: Any) -> Any:
        return None if value is None else inner(name, value)

    return optional


def _integer(name: str, value: Any) -> int:
    found = _scalar(value)
    if isinstance(found, (bool, np.bool_)) or not isinstance(found, numbers.Integral):
        raise InvalidArgumentError(f"{name} must be an integer; got {described(value)}")
    if not -_INT64 <= int(found) < _INT64:
        raise InvalidArgumentError(f"{name} must be an integer of 64 bits; got {described(value)}")
    return int(found)


def _real(name: str, value: Any) -> float:
    found = real(value)
    if found is None:
        raise InvalidArgumentError(f"{name} must be a number; got {described(value)}")
    return value if isinstance(value, int) and abs(value) < _INT64 else found


def _flag(name: str, value: Any) -> bool:
    found = _scalar(value)
    if not isinstance(found, (bool, np.bool_, numbers.Integral)) or found not in (0, 1):
        raise InvalidArgumentError(f"{name} must be True or False; got {described(value)}")
    return bool(found)


def _tensor(name: str, value: Any) -> Any:
    found = tensor(name, value)
    return value if is_empty_list(value) else found  # an empty list has no type of its own


def _one_of(allowed: tuple[Any, ...], name: str, value: Any) -> Any:
    if not isinstance(value, (str, int)) or value not in allowed:
        raise InvalidArgumentError(f"{name} must be one of {list(allowed)}; got {described(value)}")
    return value


def _instance(kinds: tuple[type, ...], name: str, value: Any) -> Any:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidArgumentError(f"{name} must be of type {wanted}; got {described(value)}")
    return value


def _scalar(value: Any) -> Any:
    if (
        isinstance(value, (Tensor, np.ndarray))
        and value.ndim == 0
        and not (isinstance(value, Tensor) and value.is_meta)
    ):
        return value.item()
    return value
