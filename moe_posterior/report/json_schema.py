"""The JSON schema of report.json, derived from the types in :mod:`~moe_posterior.report.schema`.

``python -m moe_posterior.report.json_schema`` writes it to ``schema.json`` beside this file; a test holds the two together.
"""

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_posterior.files.atomic import write_text
from moe_posterior.report.schema import SCHEMA, Report

__all__ = ["derived", "published"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NAME = "schema.json"
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
COMMENT = re.compile(r"^    (\w+): [^#]*#\s*(.+)$", re.MULTILINE)  # of a field, on its own line


def published() -> dict[str, Any]:
    """The schema that is shipped with the package.

    >>> published()["properties"]["schema"]
    {'const': 'moe-posterior/calibration-report/3'}
    """
    return json.loads(files("moe_posterior.report").joinpath(NAME).read_text(encoding="utf-8"))


def derived(*, closed: bool = False) -> dict[str, Any]:
    """The schema as the types say it.

    Args:
        closed: whether objects may hold only the keys that the types name. A published report may hold more, so that a key added within
            a version breaks no reader; tests use the closed schema.
    """
    definitions: dict[str, Any] = {}
    root = _object(Report, definitions, closed)
    root["properties"]["schema"] = {"const": SCHEMA}
    return (
        {"$schema": DRAFT, "$id": f"urn:{SCHEMA.replace('/', ':')}", "title": "Calibration report"}
        | root
        | {"$defs": dict(sorted(definitions.items()))}
    )


def _object(kind: Any, definitions: dict[str, Any], closed: bool) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    told = _comments(kind)
    properties = {}
    for name, hint in hints.items():
        properties[name] = _of(hint, definitions, closed)
        if name in told:
            properties[name] = {"description": told[name], **properties[name]}
    found: dict[str, Any] = {
        "description": " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()),
        "type": "object",
        "properties": properties,
        "required": sorted(kind.__required_keys__),
    }
    return {**found, "additionalProperties": False} if closed else found


def _comments(kind: Any) -> dict[str, str]:
    """What stands beside each field in the source, those of the bases included."""
    told: dict[str, str] = {}
    for base in (*getattr(kind, "__orig_bases__", ()), kind):
        if isinstance(base, type) and base is not kind and hasattr(base, "__annotations__"):
            told |= _comments(base)
    return told | dict(COMMENT.findall(inspect.getsource(kind)))


def _of(hint: Any, definitions: dict[str, Any], closed: bool) -> dict[str, Any]:
    if hint is Any:
        return {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if typing.is_typeddict(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # holds the place, should a type ever contain itself
            definitions[hint.__name__] = _object(hint, definitions, closed)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [_of(one, definitions, closed) for one in arguments]
        if all(set(one) == {"type"} for one in options):
            return {"type": [one["type"] for one in options]}
        return {"anyOf": options}
    if origin is Sequence:
        return {"type": "array", "items": _of(arguments[0], definitions, closed)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions, closed)}
    if origin in (typing.NotRequired, typing.Required):
        return _of(arguments[0], definitions, closed)
    raise TypeError(f"a report's types must be plain, sequences, mappings or typed dicts; got {hint}")


if __name__ == "__main__":
    text = json.dumps(derived(), indent=1, ensure_ascii=False) + "\n"
    write_text(Path(__file__).with_name(NAME), text)
    sys.stdout.write(f"{Path(__file__).with_name(NAME)}\n")
