"""Classes of the user's own: fit finds them in the current folder, evaluate imports nothing that it was not told to."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moe_posterior
from moe_posterior import InvalidArgumentError
from moe_posterior.training.own import class_names, folders_on_path, own_classes, require_importable

ROOT = Path(moe_posterior.__file__).resolve().parents[1]
MODULE = """
from moe_posterior.training.data import Digits

class HeldOut(Digits):
    known_shifts = default_shifts = ()
    test_shift = "held-out writers"

    def subsets(self):
        overall = super().subsets()["overall"]
        return {"overall": overall, "hard": overall.clone()}
"""


def moe_posterior_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "moe_posterior.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run of one arm of two on a data module of its own, and the command that fit printed."""
    folder = tmp_path_factory.mktemp(
        "a user's own folder with a name that is long enough to be broken at eighty columns"
    )
    (folder / "my_data.py").write_text(MODULE)
    experiment = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    experiment["data"] = {"class_path": "my_data.HeldOut", "init_args": {"batch_size": 64}}
    experiment["trainer"]["max_epochs"] = 2
    experiment["competence"] = {"warmup_epochs": 1}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**experiment, "name": "mine"}))
    result = moe_posterior_in(folder, "fit", "--config", "mine.yaml", "--arms", "posterior", "--run-dir", str(folder))
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.strip().startswith("moe-posterior evaluate")]
    return folder, line.strip()


def test_the_command_that_fit_prints_works_when_it_is_copied(trained: tuple[Path, str]) -> None:
    folder, line = trained
    program, *words = shlex.split(line)
    assert program == "moe-posterior"
    assert words[words.index("--arms") + 1] == "posterior"
    result = moe_posterior_in(folder, *words, "--resamples", "100")
    assert result.returncode == 0, result.stderr
    report = (folder / "mine" / "report" / "index.html").read_text()
    assert "held-out writers" in result.stdout
    assert "held-out writers" in report
    assert not re.search(r"\bclean\b", result.stdout + report.partition("<body>")[2].partition("<script>")[0])
    assert "all under a shift: held-out writers; no further shift was evaluated" in report
    assert "Action threshold. Promised" in result.stdout
    again = shlex.split(
        (folder / "mine" / "report" / "report.json").read_text().split('"command": "')[1].split('",\n')[0]
    )
    assert again[again.index("--import-from") + 1] == "."
    assert again[again.index("--arms") + 1] == "posterior"


def test_evaluate_imports_no_module_of_the_working_folder_unless_it_is_told_to(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = trained
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(folder / "mine"), str(run)], check=True)
    (tmp_path / "my_data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MODULE)
    result = moe_posterior_in(tmp_path, "evaluate", "--run", "run", "--arms", "posterior")
    assert result.returncode == 2
    assert "names 'my_data.HeldOut', whose module is not installed, and nothing was imported" in result.stderr
    assert "--import-from FOLDER" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


PLACES = {
    "data": lambda config, name: config.update(data={"class_path": name}),
    "data as a word": lambda config, name: config.update(data=name),
    "backbone": lambda config, name: config["model"].update(backbone={"class_path": name}),
    "gate": lambda config, name: config["model"].update(gate={"class_path": name}),
    "gate as a word": lambda config, name: config["model"].update(gate=name),
    "method": lambda config, name: config["model"].update(method={"class_path": name}),
    "callback": lambda config, name: config["trainer"].update(callbacks=[{"class_path": name}]),
    "logger": lambda config, name: config["trainer"].update(logger={"class_path": name}),
    "plugin": lambda config, name: config["trainer"].update(plugins=[{"class_path": name}]),
    "deep": lambda config, name: config["data"]["init_args"].update(backbone={"class_path": name}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["evil.Thing", "antigravity.Thing", "subprocess.Popen", "__main__.Thing", "not a module.X"]
)
def test_a_class_is_refused_wherever_a_configuration_names_it_before_it_is_imported(
    place: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    config = {"model": {}, "trainer": {}, "data": {"class_path": "moe_posterior.training.data.Digits", "init_args": {}}}
    require_importable(config, "config.yaml")
    PLACES[place](config, name)
    before = set(sys.modules)
    with pytest.raises(InvalidArgumentError, match=re.escape(repr(name))):
        require_importable(config, "config.yaml")
    assert set(sys.modules) == before


def test_own_classes_are_those_of_no_installed_module(tmp_path: Path) -> None:
    config = {"data": {"class_path": "mine.Data"}, "model": {"gate": {"class_path": "moe_posterior.SoftmaxGate"}}}
    assert own_classes(config) == ["mine.Data"]
    (tmp_path / "mine.py").write_text("")
    with folders_on_path([tmp_path]):
        assert own_classes(config) == []
        require_importable(config, "x")
        assert sys.path[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path


def test_files_and_plain_names_are_no_classes() -> None:
    assert list(class_names({"data": "Digits", "weights": "net.pt", "init_args": {"folder": "a.b"}})) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--model.method.help", "moe_posterior.training.methods.GroupDRO"], "step"),
        (["--model.gate.help", "moe_posterior.PosteriorGate"], "num_clusters"),
        (["--model.backbone.help", "moe_posterior.training.backbones.DigitsNet"], "out_features"),
        (["--config", str(ROOT / "configs" / "demo.yaml"), "--data.help"], "val_fraction"),
        (["--config", str(ROOT / "configs" / "demo.yaml"), "--model.backbone.help"], "out_features"),
        (["--model.method.help"], "warmup_epochs"),
    ],
)
def test_a_class_explains_its_settings(words: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_posterior.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", *words])
    assert stop.value.code == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--data.help", "PACS"], "held_out"),
        (["--data.help=PACS"], "held_out"),
        (["--model.method.help", "Robust"], "eta"),
        (["--trainer.callbacks.help", "EarlyStopping"], "patience"),
    ],
)
def test_a_class_is_explained_by_its_short_name(words: list[str], shown: str) -> None:
    # In a process of its own: pytest's doctests load some modules a second time, and a short name must be one class's.
    command = [sys.executable, "-c", "import sys; from moe_posterior.cli import main; sys.exit(main(sys.argv[1:]))"]
    result = subprocess.run([*command, "fit", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


def test_help_of_a_class_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_posterior.cli import main

    assert main(["fit", "--data.help", "nosuch"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moe-posterior fit: ")
    assert "nosuch" in said
