"""A finished report: what it says, and how it is shown and kept."""

import copy
import os
from html import escape
from pathlib import Path
from typing import Any

from moe_posterior.errors import UnwritableFileError
from moe_posterior.files.atomic import replacing_folder
from moe_posterior.report.about import with_facts
from moe_posterior.report.html import to_html
from moe_posterior.report.render import to_markdown
from moe_posterior.report.schema import OVERALL, About, AuditEvidence, Report
from moe_posterior.report.tracking import log_report
from moe_posterior.report.verdict import Verdict, verdict_of
from moe_posterior.report.writing import FILES, write_report

__all__ = ["CalibrationReport"]


class CalibrationReport:
    """The calibration of a model's predictions, from :func:`~moe_posterior.evaluation.evaluate`."""

    def __init__(self, report: Report) -> None:
        self._report = report

    @property
    def table(self) -> str:
        """The main table in Markdown."""
        return to_markdown(self._report)

    @property
    def verdict(self) -> Verdict:
        """May the score be used, from which confidence to act, and under which conditions: ``str`` gives it in plain words."""
        return verdict_of(self._report)

    def with_facts(self, about: About | None = None, audit_log: AuditEvidence | None = None) -> "CalibrationReport":
        """The same report with what only its user knows.

        Args:
            about: model, version, training_data, …; see :class:`~moe_posterior.report.schema.About`.
            audit_log: from :func:`~moe_posterior.audit.views.evidence.evidence_of`.
        """
        return CalibrationReport(with_facts(self._report, about, audit_log))

    def to_dict(self) -> Report:
        """Everything measured, as strict JSON holds it: see :class:`~moe_posterior.report.schema.Report`."""
        return copy.deepcopy(self._report)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write index.html, report.json, table.md, model_card.md and reliability.png in place of a folder, whole or not at all.

        Whatever was in the folder is replaced once the new report is complete; a kill leaves the old one.

        Raises:
            UnwritableFileError: the file system refuses, or something other than a report's folder is there.
            MissingDependencyError: without matplotlib.
        """
        target = Path(folder)
        require_own(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnwritableFileError(f"{target} cannot be written: {error.strerror or error}") from error
        with replacing_folder(target) as draft:
            write_report(self._report, draft)
        return target

    def log_to(self, tracker: Any) -> str:
        """Log metrics, parameters and files to "mlflow", "wandb" or a run of theirs; see :func:`~moe_posterior.report.log_report`."""
        return log_report(self._report, tracker)

    def _repr_html_(self) -> str:
        """The whole page in a frame of its own, for notebooks."""
        return f'<iframe srcdoc="{escape(to_html(self._report))}" width="100%" height="640"></iframe>'

    def __repr__(self) -> str:
        records = self._report["records"]
        values = [
            f"{one['arm']} {one['metric']} {one['value']:.3f}"
            for one in records
            if one["subset"] == OVERALL and one["severity"] == 0 and one["value"] is not None
        ]
        return f"CalibrationReport({', '.join(values)})"


def require_own(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a report.

    Raises:
        UnwritableFileError: it does.
    """
    if folder.exists() and not folder.is_dir():
        raise UnwritableFileError(f"{folder} cannot be written: it is there and is not a folder")
    if folder.is_dir() and (other := sorted({entry.name for entry in folder.iterdir()}.difference(FILES))):
        raise UnwritableFileError(f"{folder} holds {other[0]!r}, which is no part of a report; give another folder")
