"""The library's errors: one base class, so that one ``except`` catches them all, and a few children that say what kind."""


class MoEPosteriorError(Exception):
    """Base of every error this library raises on purpose."""


class InvalidArgumentError(MoEPosteriorError, ValueError):
    """An argument has a wrong shape, dtype or value; the message names it, what was expected and what came."""


class NotFittedError(MoEPosteriorError, RuntimeError):
    """A gate or clusterer was used before ``fit`` gave it centroids."""


class MissingDataError(MoEPosteriorError, FileNotFoundError):
    """A data file is absent; the message says where we looked and what to put there."""


class DamagedFileError(MoEPosteriorError, ValueError):
    """A file that this library wrote cannot be read back as it was written, or is not one of its files."""


class UnwritableFileError(MoEPosteriorError, OSError):
    """A file or folder cannot be written; its previous contents are intact. ``errno`` is the system's, if it gave one."""


class DivergedError(MoEPosteriorError, ArithmeticError):
    """Training produced NaN or inf; the message says what diverged, in which epoch, and what to try."""


class AuditError(MoEPosteriorError):
    """An audit log is malformed, altered, cut short or not what was asked for; the message names the first bad record."""


class AuditWriteError(AuditError, OSError):
    """The audit log cannot be written: the disk refuses, or the queue stays full. Nothing was decided."""


class AuditLockedError(AuditError):
    """Another writer has this audit log open."""


class ForkedError(MoEPosteriorError, RuntimeError):
    """An object was used in a forked child while another thread of the parent was changing it at the fork."""


class MissingDependencyError(MoEPosteriorError, ImportError):
    """A part was used whose packages belong to an extra that is not installed.

    >>> print(MissingDependencyError("lightning", "train"))
    this needs the package 'lightning', which is not installed: pip install 'moe-posterior[train]'
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed: pip install 'moe-posterior[{extra}]'"
        )
