"""Reports in MLflow and Weights & Biases, with the real packages where they are installed."""

import json
import sys
from pathlib import Path

import pytest
from report_example import full_report

from moe_posterior import InvalidArgumentError, MissingDependencyError
from moe_posterior.report.tracking import log_report, metrics_of, parameters_of

DEMO = json.loads((Path(__file__).resolve().parents[2] / "results" / "demo" / "report.json").read_text())


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    found.set_tracking_uri(f"file://{tmp_path}/runs")
    yield found
    while found.active_run():
        found.end_run()


def test_mlflow_holds_metrics_parameters_and_the_folder(mlflow, tmp_path: Path) -> None:
    run_id = log_report(DEMO, "mlflow")
    assert mlflow.active_run() is None
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(metrics_of(DEMO))
    assert run.data.params == parameters_of(DEMO)
    assert "May the score be used?" in run.data.tags["verdict"]
    files = {Path(one.path).name for one in mlflow.MlflowClient().list_artifacts(run_id, "calibration_report")}
    assert files == {"index.html", "report.json", "table.md", "model_card.md", "reliability.png"}


def test_an_open_mlflow_run_takes_the_report_and_stays_open(mlflow, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "table.md").write_text("here")
    with mlflow.start_run() as run:
        assert log_report(full_report(), "mlflow", folder=folder) == run.info.run_id
        assert mlflow.active_run().info.run_id == run.info.run_id
    with mlflow.start_run() as other:
        pass
    assert log_report(full_report(), other, folder=folder) == other.info.run_id
    assert mlflow.active_run() is None
    kept = mlflow.MlflowClient().list_artifacts(other.info.run_id, "calibration_report")
    assert [Path(one.path).name for one in kept] == ["table.md"]


def test_wandb_offline_takes_metrics_parameters_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("needs wandb, not its leftover folder")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="calibration", dir=str(tmp_path))
    try:
        assert log_report(DEMO, run) == run.id
        summary = dict(run.summary)
        assert {name: summary[name] for name in metrics_of(DEMO)} == pytest.approx(metrics_of(DEMO))
        assert run.config["verdict/softmax/usable"] == "yes"
    finally:
        run.finish()
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_missing_says_what_to_install(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(MissingDependencyError, match=tracker):
        log_report(full_report(), tracker, folder=tmp_path)


@pytest.mark.parametrize("to", ["neptune", None, 3, object()])
def test_what_is_no_tracker_is_refused(to: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="to must be"):
        log_report(full_report(), to, folder=tmp_path)


def test_names_hold_nothing_that_a_tracker_refuses() -> None:
    report = full_report()
    for one in report["records"]:
        one["subset"] = "hard=yes; <b>é" if one["subset"] == "hard" else one["subset"]
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_. -/")
        for name in metrics_of(report)
    )


def test_groups_that_differ_only_in_what_trackers_refuse_keep_their_values() -> None:
    record = {"arm": "a", "shift": "clean", "severity": 0, "metric": "ece", "low": 0.0, "high": 0.4}
    groups = ["city=Łódź", "city=Łódż", "city=a|b", "city=a/b"]
    records = [record | {"subset": group, "value": 0.1 * place} for place, group in enumerate(groups)]
    found = metrics_of({"arms": ["a"], "records": records})
    assert sorted(value for name, value in found.items() if "ece_l" not in name and "ece_h" not in name) == [
        0.1 * place for place in range(4)
    ]
    assert len(found) == 12
