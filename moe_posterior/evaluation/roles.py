"""Which column of a file holds what: said by the user, or recognised by an obvious name where only one column has such a name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_posterior.errors import InvalidArgumentError

__all__ = ["Roles", "recognised"]

PROBS = ("prob", "probs", "proba", "probas", "probability", "probabilities", "p")
LOGITS = ("logit", "logits")
LABELS = ("label", "labels", "target", "targets", "y", "y_true", "true_label", "truth", "class")
CONFIDENCE = ("confidence", "conf")
CORRECT = ("correct", "is_correct")
PREDICTED = ("prediction", "predicted", "pred", "y_pred", "predicted_label")


@dataclass(frozen=True)
class Roles:
    """Columns by what they hold; empty or None: not there."""

    probs: Sequence[str] = ()  # one column of lists, or one per class
    labels: str | None = None
    confidence: str | None = None
    correct: str | None = None
    predicted: str | None = None  # instead of ``correct``: compared with the labels
    groups: Sequence[str] = ()
    shift: str | None = None
    severity: str | None = None
    model: str | None = None
    weights: Sequence[str] = ()
    experts: Sequence[str] = ()
    configuration: str | None = None
    rows: str | None = None
    prefixes: Mapping[str, str] = field(
        default_factory=dict
    )  # of ``probs``, ``weights``, ``experts`` with one column a value

    def columns(self) -> dict[str, bool]:
        """Every column that is read, and whether it is to hold numbers."""
        numeric = [*self.probs, *self.weights, *self.experts, self.confidence, self.correct]
        return {name: True for name in numeric if name} | self.narrow()

    def narrow(self) -> dict[str, bool]:
        """The columns that a first look takes: what row of which set it is, and its label."""
        names = [self.labels, self.predicted, *self.groups, self.shift, self.severity, self.model, self.configuration]
        return {name: False for name in [*names, self.rows] if name}

    def without_shifts(self) -> "Roles":
        """The same without shifts: of calibration rows."""
        return replace(self, shift=None, severity=None)

    def text(self) -> str:
        """What is read from where, in a line."""
        single = ("labels", "confidence", "correct", "predicted", "shift", "severity", "model", "configuration", "rows")
        many = {name: getattr(self, name) for name in ("probs", "weights", "experts", "groups") if getattr(self, name)}
        found = {
            name: columns[0] if len(columns) == 1 else f"{columns[0]} … {columns[-1]}" for name, columns in many.items()
        }
        found |= {name: getattr(self, name) for name in single if getattr(self, name)}
        return ", ".join(f"{name}: {text}" for name, text in found.items())


def recognised(path: Path, names: Sequence[str], said: Roles, *, logits: bool) -> Roles:
    """The roles that the user said, completed by obvious names.

    Args:
        path: the file, for errors.
        names: its columns.
        said: by the user; ``probs``, ``weights`` and ``experts`` hold a column or a prefix of columns.
        logits: whether the values are logits.

    Raises:
        InvalidArgumentError: a column that is not there, or no obvious one, or several; the message lists the columns.
    """
    roles, prefixes = said, {}
    for name, flag in (("probs", "--probs"), ("weights", "--weights"), ("experts", "--experts")):
        if wanted := getattr(said, name):
            columns, prefix = _family(path, names, wanted[0], flag)
            roles = replace(roles, **{name: columns})  # type: ignore[arg-type]
            prefixes[name] = prefix
    single = ("labels", "confidence", "correct", "predicted", "shift", "severity", "model", "configuration", "rows")
    asked = [(name, getattr(said, name)) for name in single] + [("groups", one) for one in said.groups]
    for name, column in asked:
        if column is not None and column not in names:
            raise InvalidArgumentError(f"{path} has no column {column!r} for --{name}; {_listed(names)}")
    answers = said.confidence is not None or said.correct is not None
    if not roles.probs and not answers:
        found = _obvious_probs(path, names, logits)
        if found is not None:
            roles, prefixes["probs"] = replace(roles, probs=found[0]), found[1]
    if roles.probs:
        roles = replace(roles, labels=roles.labels or _obvious(path, names, LABELS, "--labels"))
        if roles.labels is None:
            raise InvalidArgumentError(
                f"{path} has no obvious column of labels: give --labels COLUMN; {_listed(names)}"
            )
        return replace(roles, prefixes=prefixes)
    return replace(_answers(path, names, roles), prefixes=prefixes)


def _answers(path: Path, names: Sequence[str], roles: Roles) -> Roles:
    """The columns of confidences and correctness."""
    said = roles.confidence or _obvious(path, names, CONFIDENCE, "--confidence")
    if said is None:
        raise InvalidArgumentError(
            f"{path} has no obvious columns of predictions: give --probs COLUMN or PREFIX with --labels COLUMN, or --confidence "
            f"COLUMN with --correct COLUMN; {_listed(names)}"
        )
    right = roles.correct or _obvious(path, names, CORRECT, "--correct")
    labels = roles.labels or _obvious(path, names, LABELS, "--labels")
    if right is not None:
        return replace(roles, confidence=said, correct=right, predicted=None)
    predicted = roles.predicted or _obvious(path, names, PREDICTED, "--predicted")
    if predicted is None or labels is None:
        raise InvalidArgumentError(
            f"{path} has no obvious column of correctness: give --correct COLUMN, or --predicted COLUMN with --labels COLUMN; "
            f"{_listed(names)}"
        )
    return replace(roles, confidence=said, predicted=predicted, labels=labels)


def _obvious_probs(path: Path, names: Sequence[str], logits: bool) -> tuple[Sequence[str], str] | None:
    found: list[tuple[Sequence[str], str]] = []
    for word in LOGITS if logits else PROBS:
        for name in names:
            if name.lower() == word:
                found.append(((name,), ""))
        families = dict.fromkeys(name[: len(word) + 1] for name in names if name.lower().startswith(f"{word}_"))
        for prefix in families:
            columns = _with_prefix(names, prefix)
            if len(columns) > 1:
                found.append((columns, prefix))
    if len(found) > 1:
        several = [columns[0] if not prefix else f"{prefix}…" for columns, prefix in found]
        raise InvalidArgumentError(
            f"{path} has several columns of predictions, {several}: give --probs COLUMN or PREFIX"
        )
    if not found and not logits and any(name.lower().split("_")[0] in LOGITS for name in names):
        raise InvalidArgumentError(
            f"{path} seems to hold logits: give --logits, or --probs COLUMN or PREFIX; {_listed(names)}"
        )
    return found[0] if found else None


def _obvious(path: Path, names: Sequence[str], words: Sequence[str], flag: str) -> str | None:
    found = [name for name in names if name.lower() in words]
    if len(found) > 1:
        raise InvalidArgumentError(f"{path} has several columns that could be meant, {found}: give {flag} COLUMN")
    return found[0] if found else None


def _family(path: Path, names: Sequence[str], wanted: str, flag: str) -> tuple[Sequence[str], str]:
    if wanted in names:
        return (wanted,), ""
    columns = _with_prefix(names, wanted)
    if not columns:
        raise InvalidArgumentError(
            f"{path} has no column {wanted!r} for {flag}, and none that begins so; {_listed(names)}"
        )
    return columns, wanted


def _with_prefix(names: Sequence[str], prefix: str) -> Sequence[str]:
    """Columns of a prefix, by the number that follows where all have one, else in the file's order."""
    columns = [name for name in names if name.startswith(prefix) and len(name) > len(prefix)]
    numbers = [[part for part in name.removeprefix(prefix).split("_") if part] for name in columns]
    if columns and all(parts and all(part.isdecimal() for part in parts) for parts in numbers):
        order = sorted(range(len(columns)), key=lambda place: [int(part) for part in numbers[place]])
        return [columns[place] for place in order]
    return columns


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(names[:most])
    return f"its columns are {shown}{', …' if len(names) > most else ''}"
