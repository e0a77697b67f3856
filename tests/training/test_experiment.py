"""The main job end to end, as a user runs it: real processes on scikit-learn's real digits."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from moe_posterior.cli import main
from moe_posterior.training.runs import Run, read_experiment

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
SHORT = ["--trainer.max_epochs", "5", "--competence.warmup_epochs", "2"]


def moe_posterior(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As a user runs it: a process of its own."""
    command = [sys.executable, "-m", "moe_posterior.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """The message of a command that is refused; within this process, since it ends before anything is trained."""

    def message_of(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return message_of


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def weights(run: Path, arm: str) -> dict[str, torch.Tensor]:
    return torch.load(run / arm / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    result = moe_posterior("fit", "--config", DEMO, "--run-dir", folder, *SHORT)
    assert result.returncode == 0, result.stderr
    return folder


def test_fit_then_evaluate_makes_a_report_of_all_gates(runs: Path) -> None:
    result = moe_posterior("evaluate", "--run", runs / "demo", "--resamples", "100", "--severities", "3", "--damage")
    assert result.returncode == 0, result.stderr
    assert "softmax" in result.stdout
    assert "before the damage" in result.stdout
    assert "report.json" in result.stdout
    report = json.loads((runs / "demo" / "report" / "report.json").read_text())
    assert report["arms"] == ["softmax", "posterior", "learned"]
    of = {(r["arm"], r["shift"], r["subset"], r["metric"]): r["value"] for r in report["records"]}
    for arm in report["arms"]:
        assert of[arm, "clean", "overall", "accuracy"] > 0.75  # five short epochs
        assert of[arm, "clean", "hard", "accuracy"] < of[arm, "clean", "easy", "accuracy"]
        assert of[arm, "all shifts", "overall", "accuracy"] < of[arm, "clean", "overall", "accuracy"]
    for picture in ("reliability.png", "competence-posterior.png", "competence-learned.png", "damage.png"):
        assert (runs / "demo" / "report" / picture).read_bytes().startswith(b"\x89PNG")
    assert "| softmax" in (runs / "demo" / "report" / "table.md").read_text()
    page = (runs / "demo" / "report" / "index.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert {row["name"] for row in report["calibrators"]} >= {"none", "temperature", "configuration"}
    kept = torch.load(runs / "demo" / "report" / "calibrators-posterior.pt", weights_only=True)
    assert kept["temperature"]["fitted"]


def test_the_trained_posterior_gate_has_seen_every_expert_on_every_training_row(runs: Path) -> None:
    state = weights(runs / "demo", "posterior")
    observed = state["moe.gate.posterior.successes"] + state["moe.gate.posterior.failures"]
    assert observed.sum(dim=0).tolist() == [898.0] * 4
    assert observed.sum(dim=1).min() > 0
    assert state["moe.gate.posterior.successes"].dtype == torch.float64


def test_the_gate_with_a_learned_prior_has_clusters_and_no_evidence_yet(runs: Path) -> None:
    state = weights(runs / "demo", "learned")
    for arm in ("softmax", "learned"):
        kept = torch.load(runs / "demo" / arm / "checkpoints" / "last.ckpt", weights_only=True)
        finished = json.loads((runs / "demo" / arm / "finished.json").read_text())
        assert (kept["epoch"] + 1, kept["global_step"]) == (finished["epochs"], finished["steps"]), (
            "the last, not the best"
        )
    assert state["moe.gate.clusterer.centroids"].isfinite().all()
    assert not any(state[f"moe.gate.posterior.{name}"].any() for name in ("successes", "failures", "foreseen"))


def test_a_finished_run_is_left_as_it_is(runs: Path, capsys) -> None:
    before = (runs / "demo" / "softmax" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert main(["fit", "--config", str(DEMO), "--run-dir", str(runs), *SHORT]) == 0
    assert "trained already" in capsys.readouterr().out.replace("\n", " ")
    assert (runs / "demo" / "softmax" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_other_settings_do_not_silently_reuse_a_run(runs: Path, refused) -> None:
    message = refused("fit", "--config", DEMO, "--run-dir", runs, "--model.lr", "0.1")
    assert "was made with other settings" in message


def test_a_killed_run_goes_on_and_ends_like_an_undisturbed_one(runs: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", DEMO, "--run-dir", tmp_path, "--arms", "posterior", *SHORT]
    checkpoint = tmp_path / "demo" / "posterior" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_posterior.cli", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "demo" / "posterior" / "finished.json").exists(), "it was too fast to be killed"
    result = moe_posterior(*arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demo" / "posterior" / "finished.json").exists()
    undisturbed = weights(runs / "demo", "posterior")
    for name, value in weights(tmp_path / "demo", "posterior").items():
        torch.testing.assert_close(value, undisturbed[name], rtol=0, atol=0, equal_nan=True, msg=name)
    figures = [folder / "demo" / "posterior" / "csv" / "metrics.csv" for folder in (tmp_path, runs)]
    assert figures[0].read_text() == figures[1].read_text()


def test_two_processes_do_not_write_to_one_run(tmp_path: Path, refused) -> None:
    (tmp_path / "demo").mkdir()
    with (tmp_path / "demo" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another process is writing to" in refused("fit", "--config", DEMO, "--run-dir", tmp_path)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, refused) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    (tmp_path / "demo" / "experiment.yaml").write_text("my: own")
    message = refused("fit", "--config", DEMO, "--run-dir", tmp_path, "--overwrite")
    assert "holds something other than a run" in message
    assert (tmp_path / "demo" / "thesis.txt").exists()


def test_evaluating_what_is_not_there_says_what_to_do(tmp_path: Path, runs: Path, refused) -> None:
    assert "there is no run in" in refused("evaluate", "--run", tmp_path / "nothing")
    assert "got ['earthquake']" in refused("evaluate", "--run", runs / "demo", "--shifts", "earthquake")
    assert "arms must be among ['softmax', 'posterior', 'learned']" in refused(
        "evaluate", "--run", runs / "demo", "--arms", "x"
    )
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("model: {", "is not valid YAML"),
        (yaml.safe_dump({"name": "../up"}), "must be plain words; got '../up'"),
    ],
)
def test_a_broken_experiment_file_is_named(tmp_path: Path, content: str, message: str, refused) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    said = refused("fit", "--config", file, "--run-dir", tmp_path)
    assert message in said
    assert str(file) in said


def test_an_arm_whose_gate_was_never_fitted_is_not_evaluated(tmp_path: Path, refused) -> None:
    settings = ["--trainer.max_epochs", "1", "--competence.warmup_epochs", "5", "--arms", "posterior"]
    assert moe_posterior("fit", "--config", DEMO, "--run-dir", tmp_path, *settings).returncode == 0
    message = refused("evaluate", "--run", tmp_path / "demo", "--arms", "posterior", "--shifts")
    assert "was never fitted: train past competence.warmup_epochs" in message


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_complete(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["num_experts"] == 4


def test_overwriting_a_run_leaves_what_was_put_beside_it(tmp_path: Path, refused) -> None:
    run = Run(tmp_path / "demo")
    run.folder.mkdir()
    run.prepare(read_experiment(DEMO))
    (run.folder / "notes.txt").write_text("mine")
    (run.arm("softmax").folder / "old.txt").write_text("of the run")
    run.prepare(read_experiment(DEMO), overwrite=True)
    assert (run.folder / "notes.txt").exists()
    assert not (run.arm("softmax").folder / "old.txt").exists()


def test_a_first_attempt_that_failed_does_not_stand_in_the_way(tmp_path: Path) -> None:
    run = Run(tmp_path / "demo")
    run.folder.mkdir()
    experiment = read_experiment(DEMO)
    run.prepare(experiment.override({"modle": {"lr": 3}}))
    run.prepare(experiment)
    assert "modle" not in run.arm("softmax").config.read_text()


def test_a_damaged_checkpoint_is_named(runs: Path, tmp_path: Path, refused) -> None:
    shutil.copytree(runs / "demo", tmp_path / "demo")
    checkpoint = tmp_path / "demo" / "posterior" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"{checkpoint} cannot be read" in refused("evaluate", "--run", tmp_path / "demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../evil"], "must be plain words; got '../evil' in --name"),
        (["--name", "report"], "got 'report'"),
        (["--model.lr", "["], "--model.lr must have a YAML value"),
        (["--arms", "x"], "arms must be among"),
        (["stray"], "settings must read --key value"),
    ],
)
def test_wrong_command_lines_are_answered_with_a_sentence(
    tmp_path: Path, arguments: list, message: str, refused
) -> None:
    assert message in refused("fit", "--config", DEMO, "--run-dir", tmp_path, *arguments)


def test_a_place_that_cannot_be_written_is_named(refused) -> None:
    assert "/dev/null" in refused("fit", "--config", DEMO, "--run-dir", "/dev/null")


def test_too_few_resamples_are_refused_before_anything_is_predicted(runs: Path, refused) -> None:
    assert "--resamples must be at least 100" in refused("evaluate", "--run", runs / "demo", "--resamples", "1")


def test_being_told_to_stop_is_not_taken_for_the_end(tmp_path: Path) -> None:
    arguments = ["fit", "--config", DEMO, "--run-dir", tmp_path, "--arms", "posterior", "--trainer.max_epochs", "500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_posterior.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "demo" / "posterior" / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"interrupted" in errors
    assert not (tmp_path / "demo" / "posterior" / "finished.json").exists()


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path: Path) -> None:
    settings = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = moe_posterior("fit", "--config", DEMO, "--run-dir", tmp_path, "--arms", "posterior", *SHORT, *settings)
    assert result.returncode == 0, result.stderr
    state = weights(tmp_path / "demo", "posterior")
    observed = state["moe.gate.posterior.successes"] + state["moe.gate.posterior.failures"]
    assert observed.sum(dim=0).tolist() == [898.0] * 4  # each training row once, whichever process saw it
