"""What no program can know of a deployment and its user must say: the model, its training data, the intended use, the audit log."""

import os
from typing import Any

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.reading import read_mapping
from moe_posterior.report.schema import About, AuditEvidence, Report

__all__ = ["FACTS", "read_about", "with_facts"]

FACTS = tuple(About.__annotations__)
ADVICE = f"it may hold {', '.join(FACTS)}, each a line of text"


def read_about(path: str | os.PathLike[str]) -> About:
    """The facts in a YAML file, each a text or a number.

    Raises:
        MissingDataError: there is no such file.
        InvalidArgumentError: it is no YAML, names something else than :data:`FACTS`, or a fact is no text.
        MissingDependencyError: without PyYAML.
    """
    found: dict[str, Any] = {}
    for name, value in read_mapping(path, ADVICE, InvalidArgumentError).items():
        if name not in FACTS:
            raise InvalidArgumentError(f"{path} must name only {', '.join(FACTS)}; got {name!r}")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise InvalidArgumentError(f"{name} in {path} must be a text; got {type(value).__name__} {value!r}")
        found[name] = str(value).strip()
    return found  # type: ignore[return-value]


def with_facts(report: Report, about: About | None = None, audit_log: AuditEvidence | None = None) -> Report:
    """The report with what its user said of the deployment; given facts replace measured identity.

    >>> report = with_facts({"arms": ["a"]}, {"model": "triage", "version": "2.1", "routing": "soft"})
    >>> report["identity"]
    {'model': 'triage 2.1', 'routing': {'a': 'soft'}}
    """
    found: Report = {**report}
    if audit_log is not None:
        found["audit_log"] = audit_log
    if about:
        identity: Any = {**(report.get("identity") or {})}
        if named := " ".join(about[key] for key in ("model", "version") if about.get(key)):
            identity["model"] = named
        parts = {"training": about.get("training_data"), "evaluation": about.get("evaluation_data")}
        if said := {part: text for part, text in parts.items() if text}:
            identity["data"] = {**(identity.get("data") or {}), **said}
        if routing := about.get("routing"):
            identity["routing"] = dict.fromkeys(report.get("arms") or ["model"], routing)
        found["about"], found["identity"] = about, identity
    return found
