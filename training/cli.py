"""``moe-posterior fit``: train the arms of an experiment, one after the other."""

import shlex
import tempfile
from pathlib import Path

import yaml
from lightning import LightningModule
from rich.console import Console

from moe_posterior.commands.fit import parser
from moe_posterior.escape import terminal
from moe_posterior.files.atomic import write_text
from moe_posterior.training.arms import is_launched_rank, train
from moe_posterior.training.lightning_cli import ExperimentCLI
from moe_posterior.training.modules import is_classifier
from moe_posterior.training.own import folders_on_path, own_classes, without_folder
from moe_posterior.training.runs import Arm, Experiment, Run, read_experiment, require_folder_name
from moe_posterior.training.settings import class_help, parse_settings

__all__ = ["fit"]


def fit(arguments: list[str]) -> int:
    """Run ``moe-posterior fit`` with the given command-line arguments."""
    with folders_on_path(["."]):
        return _fit(arguments)


def _fit(arguments: list[str]) -> int:
    if (asked := class_help(arguments)) is not None:
        with tempfile.TemporaryDirectory() as folder:
            module = LightningModule if asked[0] == "--model.help" else None
            ExperimentCLI(Arm("help", Path(folder)), ["fit", *asked], run=True, module=module)
    options, settings = parser().parse_known_args(arguments)

    experiment = read_experiment(options.config).override(parse_settings(settings))
    arms = experiment.chosen(options.arms)
    if options.name is not None:
        require_folder_name(options.name, "--name")
    run = Run(Path(options.run_dir) / (options.name or experiment.name))
    if options.print_config:
        return print_config(experiment, arms[0])
    console = Console()
    if is_launched_rank():
        for name in arms:
            train(run.arm(name), console, run.origin(experiment, name))
        return 0
    with run.locked():
        origins = {name: run.origin(experiment, name) for name in arms}
        run.prepare(experiment, overwrite=options.overwrite, arms=options.arms)
        for name, origin in origins.items():
            train(run.arm(name), console, origin)
    if (command := evaluate_command(run, experiment)) is None:
        kept = ", ".join(str(run.arm(name).checkpoint) for name in arms)
        console.print(terminal(f"Trained: {kept}"), markup=False, highlight=False, soft_wrap=True)
        return 0
    console.print(terminal(f"Trained: {run.folder}. Evaluate it with:"), markup=False, highlight=False)
    console.print(f"  {terminal(command)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def evaluate_command(run: Run, experiment: Experiment) -> str | None:
    """The command that evaluates the trained classifiers of a run, to be copied to a shell in this folder; None without any."""
    finished = [name for name in experiment.arms if run.arm(name).finished]
    trained = [name for name in finished if is_classifier(experiment.config(name))]
    if not trained:
        return None
    words = ["moe-posterior", "evaluate", "--run", str(run.folder)]
    words += ["--arms", *trained] if len(trained) < len(experiment.arms) else []
    with without_folder("."):
        own = [name for arm in trained for name in own_classes(experiment.config(arm))]
    return shlex.join([*words, *(["--import-from", "."] if own else [])])


def print_config(experiment: Experiment, arm_name: str) -> int:
    """Print the complete configuration of an arm with all defaults."""
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm(arm_name, Path(folder))
        write_text(arm.config, yaml.safe_dump(experiment.config(arm_name)))
        ExperimentCLI(arm, ["fit", "--config", str(arm.config), "--print_config"], run=True)
    return 0
