"""``moe-posterior fit`` on a LightningModule and a LightningDataModule that are not ours."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from strangers import EXPERTS, Clouds, Judging, Layers

from moe_posterior import InvalidArgumentError
from moe_posterior.cli import main
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.modules import is_classifier, module_class
from moe_posterior.training.runs import Run, merge
from moe_posterior.training.trained import load_model

EXPERIMENT = {
    "name": "run",
    "seed_everything": 1,
    "model": {"class_path": "strangers.Judging", "init_args": {"lr": 0.01}},
    "data": {"class_path": "strangers.Clouds"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False, "log_every_n_steps": 5},
    "belief": {"warmup": 5},
}


class Remembering(Layers):
    """It keeps its arguments in the checkpoint, as Lightning's examples do."""

    def __init__(self, width: int = 3, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class Manual(Layers):
    """It calls backward and the optimizer itself, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        self.optimizers().step()
        self.optimizers().zero_grad()


def fit(folder: Path, *words: str, **changes: Any) -> int:
    (folder / "run.yaml").write_text(yaml.safe_dump(merge(EXPERIMENT, changes)))
    return main(["fit", "--config", str(folder / "run.yaml"), "--run-dir", str(folder), *words])


def checkpoint(folder: Path, arm: str = "model") -> dict[str, Any]:
    return torch.load(folder / "run" / arm / "checkpoints" / "last.ckpt", weights_only=True)


def evidence(folder: Path, arm: str = "model") -> list[float]:
    state = checkpoint(folder, arm)["state_dict"]
    gates = [name.removesuffix("successes") for name in state if name.endswith(".successes")]
    return [float(state[f"{gate}successes"].sum() + state[f"{gate}failures"].sum()) for gate in gates]


def said(capsys: pytest.CaptureFixture[str], command: str = "fit") -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"moe-posterior {command}: ")]
    return line


WORKS = [
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger;--trainer.logger.save_dir={folder}",
    "--trainer.precision=32-true",
    "--trainer.precision=64-true",
    "--trainer.precision=bf16-true",
    "--trainer.precision=bf16-mixed",
    "--trainer.precision=16-mixed",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.callbacks=[{{class_path: lightning.pytorch.callbacks.LearningRateMonitor}}]",
    "--model.class_path=strangers.Layers",
    "--model=strangers.Layers;--model.lr=0.02",
    "--model.class_path=test_own_model.Remembering",
    "--model.class_path=test_own_model.Manual",
]


@pytest.fixture(autouse=True)
def own_folder_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("setting", WORKS)
def test_a_setting_that_works_trains_to_a_checkpoint_with_evidence(setting: str, tmp_path: Path) -> None:
    assert fit(tmp_path, *setting.format(folder=tmp_path).split(";")) == 0
    assert all(count > 0 for count in evidence(tmp_path))


ANSWERED = {
    "--trainer.enable_checkpointing=false": "trainer.enable_checkpointing must not be false",
    "--trainer.barebones=true": "trainer.barebones must not be true",
    "--trainer.precision=16-true": "--trainer.precision 32-true",
    "--trainer.logger=lightning.pytorch.loggers.WandbLogger": "pip install -U 'wandb",
    "--trainer.logger=lightning.pytorch.loggers.MLFlowLogger": "pip install -U 'mlflow",
    "--trainer.callbacks=[{class_path: moe_posterior.training.belief.BeliefCallback}]": "more than one stateful callback",
    "--model.class_path=strangers.Nobody": "model.class_path must name a class; got 'strangers.Nobody'",
    "--model.class_path=nowhere.Nobody": "No module named 'nowhere'",
    "--model.class_path=pathlib.Path": "must name a lightning.LightningModule; got 'pathlib.Path'",
    "--model.width=3": "width",
    "--belief.warmup=0": "warmup must be an integer of at least 1; got 0",
    "--data=strangers.Layers": "Layers",
}


@pytest.mark.parametrize("setting", ANSWERED)
def test_a_setting_that_cannot_work_is_one_sentence(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(package in setting.lower() and find_spec(package) for package in ("wandb", "mlflow")):
        pytest.skip("the logger's package is installed here")
    assert fit(tmp_path, setting) == 2
    assert ANSWERED[setting] in said(capsys)


def test_a_run_that_was_killed_goes_on_from_its_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    assert fit(tmp_path / "whole", "--trainer.max_epochs=3", "--belief.warmup=15") == 0

    class Killed(Exception):
        pass

    before = Judging.training_step

    def dying(self: Judging, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 13:
            raise Killed
        return before(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judging, "training_step", dying)
        with pytest.raises(Killed):
            fit(tmp_path, "--trainer.max_epochs=3", "--belief.warmup=15")
    assert checkpoint(tmp_path)["global_step"] == 10  # within the warm-up
    assert fit(tmp_path, "--trainer.max_epochs=3", "--belief.warmup=15") == 0
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path)
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0, equal_nan=True)


def test_arms_may_train_different_modules_and_evaluate_says_which_it_cannot_report_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"mine": {}, "other": {"model": {"class_path": "strangers.Layers"}}}
    assert fit(tmp_path, arms=arms) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert "evaluate" not in printed
    assert f"Trained: {tmp_path}/run/mine/checkpoints/last.ckpt, {tmp_path}/run/other/checkpoints/last.ckpt" in printed
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--arms", "mine"]) == 2
    line = said(capsys, "evaluate")
    assert "evaluate reports on a MoEClassifier or a class derived from it; arm 'mine' trained a Judging" in line
    assert str(tmp_path / "run" / "mine" / "checkpoints" / "last.ckpt") in line


def test_a_classifier_of_ours_trains_on_any_data_module_that_says_how_many_classes_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"backbone": {"class_path": "points.Plane"}, "gate": "moe_posterior.SoftmaxGate"}
    changes = {
        "model": model,
        "name": "run",
        "trainer": EXPERIMENT["trainer"],
        "data": {"class_path": "strangers.Clouds"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path)]) == 2
    assert "data must have an int attribute num_classes" in said(capsys)
    changes["data"] = {"class_path": "test_own_model.Named"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path)]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 2
    assert "data must be a ClassificationData to be evaluated" in said(capsys, "evaluate")


class _Dicts(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        points, target = self.rows[place]
        return {"input": points, "target": target, "index": place}


class Named(Clouds):
    """The same rows as mappings, and how many classes there are."""

    num_classes = 3

    def _loader(self, seed: int) -> Any:
        return torch.utils.data.DataLoader(_Dicts(super()._loader(seed).dataset), self.batch_size)


class Derived(MoEClassifier):
    """One of ours with something of its own."""

    def __init__(self, *args: Any, label: str = "mine", **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = label


def test_a_class_derived_from_our_classifier_is_told_the_classes_and_can_be_evaluated(tmp_path: Path) -> None:
    gate = {"class_path": "moe_posterior.PosteriorGate", "init_args": {"num_clusters": 3, "top_k": 2}}
    options = {"backbone": {"class_path": "points.Plane"}, "gate": gate, "label": "theirs"}
    experiment = {
        "name": "run",
        "model": {"class_path": "test_own_model.Derived", "init_args": options},
        "data": {"class_path": "points.Points", "init_args": {"batch_size": 48}},
        "trainer": EXPERIMENT["trainer"],
        "competence": {"warmup_epochs": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path)]) == 0
    folders = ["--import-from", str(Path(__file__).parent), "--import-from", str(Path(__file__).parents[1])]
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--resamples", "100", *folders]) == 0
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    model = load_model(Run(tmp_path / "run").arm("model"))
    assert (type(model).__name__, model.label, model.num_classes) == ("Derived", "theirs", 3)


def test_the_class_of_a_model_is_found_without_building_it() -> None:
    assert is_classifier({"model": {"num_experts": 4}})
    assert is_classifier({"model": "MoEClassifier"})
    assert module_class({"model": {"class_path": "strangers.Layers"}}) is Layers
    assert module_class({"model": "strangers.Layers"}) is Layers
    assert not is_classifier({"model": "strangers.Layers"})
    assert module_class({"model": "Layers"}) is lightning.LightningModule
    with pytest.raises(InvalidArgumentError, match=re.escape("'strangers.EXPERTS'")):
        module_class({"model": "strangers.EXPERTS"})
    assert EXPERTS == 4


def test_help_shows_the_arguments_of_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "strangers.Layers"])
    assert stop.value.code == 0
    assert "--model.lr" in capsys.readouterr().out


def test_print_config_shows_what_the_belief_is_kept_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["belief"]["warmup"] == 5
    assert shown["belief"]["sample_size"] == 8192
    assert shown["model"]["class_path"] == "strangers.Judging"
    assert "competence" not in shown
