"""Training one arm of a run to its end: from nothing, from its last checkpoint, or from the warm-up that it shares with another arm."""

import os
import sys
import time
from importlib.metadata import version

import torch
from rich.console import Console

from moe_posterior.errors import MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.training.divergence import require_finite
from moe_posterior.training.lightning_cli import ExperimentCLI
from moe_posterior.training.log import MetricsFile
from moe_posterior.training.runs import Arm
from moe_posterior.training.trained import read_checkpoint

__all__ = ["is_launched_rank", "train"]


def train(arm: Arm, console: Console, origin: Arm | None = None) -> None:
    """Train one arm to its end.

    It resumes from its last checkpoint if it has one, else it starts from the end of ``origin``'s warm-up if an origin is given.

    Raises:
        InvalidArgumentError, DamagedFileError: the checkpoint to start from cannot be used. MissingDataError: the origin has none.
        DivergedError: training ended with numbers that are not finite. KeyboardInterrupt: it was interrupted.
    """
    if arm.finished:
        console.print(terminal(f"{arm.folder} is trained already"), markup=False)
        return
    done, start = _start_of(arm, console, origin)
    if not is_launched_rank():
        MetricsFile(str(arm.figures)).keep_before(done)
    started = time.monotonic()
    try:
        cli = ExperimentCLI(arm, ["fit", "--config", str(arm.config), *start], run=True)
    except SystemExit as stop:
        if stop.code == 2:  # a mistake in the configuration, already explained
            raise
        raise KeyboardInterrupt from stop  # Lightning leaves like this on Ctrl-C and on SIGTERM
    finally:
        _end_tracking()
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    if is_launched_rank():
        return
    require_finite(dict(cli.model.named_parameters()), f"arm {arm.name!r}", cli.trainer.current_epoch)
    arm.finish(
        {
            "epochs": cli.trainer.current_epoch,
            "steps": cli.trainer.global_step,
            "seconds_of_last_session": round(time.monotonic() - started, 1),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        }
    )


def _end_tracking() -> None:
    """W&B keeps its run open until it is told, and would log the next arm into it."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish()  # type: ignore[union-attr]  # it is there, since it has a run


def _start_of(arm: Arm, console: Console, origin: Arm | None) -> tuple[int, list[str]]:
    """The steps that the arm has behind it, and the arguments that make LightningCLI go on from there."""
    if arm.checkpoint.is_file():
        steps = read_checkpoint(arm.checkpoint)["global_step"]
        console.print(terminal(f"{arm.folder} resumes from {arm.checkpoint}"), markup=False)
        return steps, ["--ckpt_path", str(arm.checkpoint)]
    if origin is None:
        console.print(terminal(f"{arm.folder} starts"), markup=False)
        return 0, []
    if not origin.warmup.is_file():
        raise MissingDataError(
            f"{arm.folder} branches from {origin.warmup}, which does not exist: train {origin.name!r} first, with a method of the "
            "same warmup_epochs"
        )
    read_checkpoint(origin.warmup)
    console.print(terminal(f"{arm.folder} branches from {origin.warmup}"), markup=False)
    return 0, ["--ckpt_path", str(origin.warmup)]


def is_launched_rank() -> bool:
    """Whether a launcher started this process beside the first one, which holds the lock and writes the run's folder."""
    return any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
