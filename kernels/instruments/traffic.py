"""Bytes that a compiled kernel reads and writes in global memory: one program of its PTX, executed address by address.

Every statement on which an address, a predicate of an access or a branch depends is executed for all threads of the program at once;
the others, arithmetic on data, are skipped, and their results read as zero. So a data-dependent branch is not taken, and
data-dependent rows are row 0: the bytes of such gathers are right, the addresses are not.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_posterior.errors import MoEPosteriorError

_STATEMENT = re.compile(r"^\s*(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_LABEL = re.compile(r"^(\$L\w+):")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ACCESS = re.compile(r"(ld|st)\.global\b|cp\.async\.c[ag]\.shared\.global")
_PARAMETER = re.compile(r"_param_(\d+)\]")
_SPACE = 40  # bits of address space given to each parameter
_MOST_STATEMENTS = 10**7
Value = Any  # an int64 array over the threads, or one number for all


class UnreadableCodeError(MoEPosteriorError):
    """An address depends on PTX that this module does not understand."""


@dataclass
class Access:
    """Bytes of one parameter, by one program."""

    merged: int = 0  # what its threads ask for, an address that several ask for in one instruction counted once
    by_thread: int = 0  # the same, counted for every thread


@dataclass(frozen=True)
class _Statement:
    negated: bool
    predicate: str | None
    operation: str
    operands: tuple[str, ...]


def walk(ptx: str, arguments: dict[int, int], num_threads: int) -> dict[int, Access]:
    """Loads and stores of program 0, by the position of the pointer among the kernel's parameters.

    Args:
        ptx: one kernel.
        arguments: values of the integer parameters by position; all others are taken for pointers.
        num_threads: of a program.

    Raises:
        UnreadableCodeError: an address depends on a statement that is not understood, or there is no end.
    """
    statements, labels = _parse(ptx)
    needed = _slice(statements)
    threads = np.arange(num_threads, dtype=np.int64)
    registers: dict[str, Value] = defaultdict(int, {"%tid.x": threads})
    found: dict[int, Access] = defaultdict(Access)
    at = executed = 0
    while at < len(statements):
        statement = statements[at]
        at += 1
        if at - 1 not in needed:
            continue
        executed += 1
        if executed > _MOST_STATEMENTS:
            raise UnreadableCodeError(f"the kernel must end; got {executed} statements")
        guard = np.broadcast_to(_guard(statement, registers), num_threads)
        if statement.operation.startswith("bra"):
            if guard.all():
                at = labels[statement.operands[0]]
            elif guard.any():
                raise UnreadableCodeError(
                    f"branches must be taken by all threads of a program; got one to {statement.operands[0]}"
                )
        elif _ACCESS.match(statement.operation):
            _count(statement, registers, guard, found)
        elif statement.operation == "ret":
            break
        else:
            _execute(statement, registers, guard, arguments)
    return dict(found)


def _parse(ptx: str) -> tuple[list[_Statement], dict[str, int]]:
    statements: list[_Statement] = []
    labels: dict[str, int] = {}
    for line in ptx.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(statements)
        elif match := _STATEMENT.match(line):
            operands = tuple(_OPERAND.findall(match[4]))
            # A branch to any other label is a wait for a barrier, within inline assembly.
            if not match[3].startswith("bra") or operands[0].startswith("$L"):
                statements.append(_Statement(match[1] == "!", match[2], match[3], operands))
    return statements, labels


def _names(text: str) -> set[str]:
    return set(re.findall(r"%[\w.]+", text))


def _slice(statements: list[_Statement]) -> set[int]:
    """The statements whose results reach an address, a branch or the predicate of either."""
    wanted: set[str] = set()
    needed: set[int] = set()
    for i, s in enumerate(statements):
        if s.operation.startswith("bra") or s.operation == "ret" or _ACCESS.match(s.operation):
            needed.add(i)
            addresses = [operand for operand in s.operands if operand.startswith("[")]
            size = s.operands[-1:] if s.operation.startswith("cp.") else ()
            wanted |= _names(" ".join([*addresses, *size, s.predicate or ""]))
    grown = True
    while grown:
        grown = False
        for i, s in enumerate(statements):
            if i not in needed and s.operands and _names(s.operands[0]) & wanted and _understood(s):
                needed.add(i)
                wanted |= _names(" ".join([*s.operands[1:], s.predicate or ""]))
                grown = True
    return needed


def _understood(s: _Statement) -> bool:
    """Whether a statement computes on addresses; the rest computes on data: sums of products, loaded or exchanged values."""
    base, *_, kind = s.operation.split(".")
    if base == "ld" and not s.operation.startswith("ld.param"):
        return False
    if base == "ld" and "{" in s.operands[0]:
        raise UnreadableCodeError(f"parameters must be loaded one by one; got {s.operation}")
    return (
        base in _OPERATIONS and not kind.startswith(("f", "bf")) and (base == "mov" or "{" not in "".join(s.operands))
    )


def _guard(s: _Statement, registers: dict[str, Value]) -> Value:
    if s.predicate is None:
        return np.True_
    taken = np.asarray(registers[s.predicate]) != 0
    return ~taken if s.negated else taken


def _value(operand: str, registers: dict[str, Value]) -> Value:
    if operand.startswith("%"):
        return registers[operand]
    return 0 if operand.startswith("global_smem") else int(operand, 0)


def _count(s: _Statement, registers: dict[str, Value], guard: np.ndarray, found: dict[int, Access]) -> None:
    address = next(o for o in reversed(s.operands) if o.startswith("[")).strip("[]")
    base, _, offset = address.partition("+")
    addresses = np.broadcast_to(_value(base.strip(), registers) + int(offset or 0), guard.shape)[guard]
    width, asked = _width(s, registers)
    if not asked.all():
        addresses = addresses[np.broadcast_to(asked, guard.shape)[guard]]
    if not len(addresses):
        return
    parameter = int(addresses[0] >> _SPACE) - 1
    access = found[parameter]
    access.by_thread += width * len(addresses)
    access.merged += width * len(np.unique(addresses))


def _width(s: _Statement, registers: dict[str, Value]) -> tuple[int, np.ndarray]:
    """Bytes per thread, and which threads access memory at all: a masked asynchronous copy moves no bytes."""
    if s.operation.startswith("cp."):
        size = np.asarray(_value(s.operands[-1], registers))
        return int(s.operands[2], 0), size > 0
    vector = re.search(r"\.v(\d)", s.operation)
    return int(s.operation.rsplit(".", 1)[1][1:]) // 8 * int(vector[1] if vector else 1), np.asarray(True)


def _wrap(value: Value, bits: int) -> Value:
    if bits == 64:
        return value
    half = 1 << (bits - 1)
    return ((value + half) & ((1 << bits) - 1)) - half


def _unsigned(value: Value, bits: int) -> Value:
    return value & ((1 << bits) - 1) if bits < 64 else np.asarray(value).astype(np.uint64)


def _execute(s: _Statement, registers: dict[str, Value], guard: np.ndarray, arguments: dict[int, int]) -> None:
    base, *middle, kind = s.operation.split(".")
    bits = 1 if kind == "pred" else int(kind[1:])
    target, *sources = s.operands
    if target.startswith("{"):
        return _unpack(target, _value(sources[0], registers), bits, registers)
    if base == "ld":
        position = int(_PARAMETER.search(s.operands[1])[1])  # type: ignore[index]
        value: Value = arguments.get(position, (position + 1) << _SPACE)
    elif sources[0].startswith("{"):
        value = _pack([_value(part, registers) for part in _parts(sources[0])], bits)
    else:
        values = [np.asarray(_value(operand, registers), dtype=np.int64) for operand in sources]
        value = _OPERATIONS[base](middle, kind[0] == "u", bits, values)
    if s.predicate is not None:
        value = np.where(guard, value, registers[s.operands[0]])
    registers[s.operands[0]] = value


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _unpack(target: str, value: Value, bits: int, registers: dict[str, Value]) -> None:
    parts = _parts(target)
    width = bits // len(parts)
    for i, part in enumerate(parts):
        registers[part] = _wrap(np.asarray(value, dtype=np.int64) >> (i * width), width)


def _pack(parts: list[Value], bits: int) -> Value:
    width = bits // len(parts)
    total = np.zeros((), dtype=np.int64)
    for i, part in enumerate(parts):
        total = total | (_unsigned(np.asarray(part, dtype=np.int64), width) << (i * width))
    return _wrap(total, bits)


def _compare(middle: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
    a, b = (_unsigned(v, bits) for v in values) if unsigned else values
    order = middle[0].removesuffix("o").removesuffix("s") if middle[0] in ("lo", "ls", "hi", "hs") else middle[0]
    compared = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if order not in compared or len(middle) > 1:
        raise UnreadableCodeError(f"comparison must be a plain one of integers; got {'.'.join(middle)}")
    return compared[order].astype(np.int64)


def _product(middle: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
    a, b = (_unsigned(v, bits) for v in values[:2]) if unsigned and bits == 32 else values[:2]
    total = a * b + (values[2] if len(values) > 2 else 0)
    if middle[0] == "hi":
        raise UnreadableCodeError("products must be mul.lo or mul.wide; got mul.hi")
    return total if middle[0] == "wide" else _wrap(total, bits)


def _convert(middle: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
    target, value = middle[-1], values[0]
    if target.startswith(("f", "bf")):
        return np.zeros_like(value)
    wide = _unsigned(value, bits) if unsigned and bits < 64 else value
    return _wrap(wide, int(target[1:]))


def _shift_right(_: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
    return (_unsigned(values[0], bits) if unsigned else values[0]) >> values[1].astype(values[0].dtype)


def _extract(_: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
    value, start, length = values
    field = (_unsigned(value, bits) >> start) & ((1 << length) - 1)
    return field if unsigned else np.where(field >> (length - 1), field - (1 << length), field)


def _divide(remainder: bool) -> Callable[..., Value]:
    def apply(_: list[str], unsigned: bool, bits: int, values: list[Value]) -> Value:
        a, b = (_unsigned(v, bits) for v in values) if unsigned else values
        b = np.where(b == 0, 1, b)
        quotient = (np.sign(a) * np.sign(b)) * (np.abs(a) // np.abs(b))
        return a - quotient * b if remainder else quotient

    return apply


def _plain(function: Callable[..., Value]) -> Callable[..., Value]:
    return lambda middle, unsigned, bits, values: _wrap(function(*values), bits) if bits > 1 else function(*values) & 1


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "ld": _plain(lambda a: a),  # of a parameter; other loads are data
    "mov": _plain(lambda a: a),
    "add": _plain(lambda a, b: a + b),
    "sub": _plain(lambda a, b: a - b),
    "neg": _plain(lambda a: -a),
    "and": _plain(lambda a, b: a & b),
    "or": _plain(lambda a, b: a | b),
    "xor": _plain(lambda a, b: a ^ b),
    "not": _plain(lambda a: ~a),
    "shl": _plain(lambda a, b: a << b),
    "shr": _shift_right,
    "min": _plain(np.minimum),
    "max": _plain(np.maximum),
    "selp": _plain(lambda a, b, p: np.where(p != 0, a, b)),
    "mul": _product,
    "mad": _product,
    "setp": _compare,
    "cvt": _convert,
    "bfe": _extract,
    "div": _divide(remainder=False),
    "rem": _divide(remainder=True),
}
