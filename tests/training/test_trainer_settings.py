"""Every switch and precision of the trainer either works, up to the evaluation, or is answered with one sentence."""

import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from points import Tracker

from moe_posterior.cli import main
from moe_posterior.training.runs import Run
from moe_posterior.training.trained import load_model


@pytest.fixture
def experiment(tmp_path: Path) -> list[str]:
    """The words of a fit command on points, with one arm whose gate is fitted and refitted."""
    gate = {"class_path": "moe_posterior.PosteriorGate", "init_args": {"num_clusters": 3, "top_k": 2}}
    content = {
        "name": "run",
        "data": {"class_path": "points.Points", "init_args": {"batch_size": 48}},
        "model": {"backbone": {"class_path": "points.Plane"}, "gate": gate},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_model_summary": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("enable_progress_bar", "false"),
        ("logger", "false"),
        ("precision", "32-true"),
        ("precision", "64-true"),
        ("precision", "bf16-mixed"),
        ("precision", "bf16-true"),
    ],
)
def test_a_setting_that_works_trains_to_an_arm_that_can_be_evaluated(
    experiment: list[str], tmp_path: Path, setting: str, value: str
) -> None:
    assert main([*experiment, f"--trainer.{setting}", value]) == 0
    model = load_model(Run(tmp_path / "run").arm("model"))
    assert model(torch.zeros(1, 2)).sum().item() == pytest.approx(1.0, abs=1e-3)
    assert model.moe.gate.posterior.successes.sum() + model.moe.gate.posterior.failures.sum() == 4 * 240


@pytest.mark.parametrize(
    ("setting", "value", "answer"),
    [
        ("max_epochs", "-3", "`max_epochs` must be a non-negative integer or -1. You passed in -3."),
        ("enable_checkpointing", "false", "trainer.enable_checkpointing must not be false"),
        ("barebones", "true", "trainer.barebones must not be true"),
        ("precision", "8-bit", "precision"),
        ("precision", "16-true", "--trainer.precision 32-true"),  # AdamW's epsilon is 0 in half precision
        ("accelerator", "abacus", "abacus"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(
    experiment: list[str], setting: str, value: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*experiment, f"--trainer.{setting}={value}"]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-posterior fit: ")]
    assert answer in said


def test_a_loggers_own_refusal_is_one_sentence(experiment: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logger = ["--trainer.logger", "points.Tracker", "--trainer.logger.server", "nowhere"]
    assert main([*experiment, *logger]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-posterior fit: ")]
    assert said.endswith("cannot be used: no server at 'nowhere'")


def test_reading_a_trained_arm_makes_no_logger(
    experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*experiment, "--trainer.logger", "points.Tracker", "--trainer.logger.server", "here"]) == 0
    monkeypatch.setattr(Tracker, "__init__", lambda self, server: pytest.fail("a logger was made"))
    assert load_model(Run(tmp_path / "run").arm("model")).moe.gate.fitted


def test_every_arm_ends_the_run_that_its_tracker_keeps_open(
    experiment: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, ended = types.ModuleType("wandb"), []
    tracker.run = "open"
    tracker.finish = lambda: ended.append(setattr(tracker, "run", None))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert main([*experiment, "--trainer.max_epochs", "1"]) == 0
    assert len(ended) == 1
