import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_posterior
from moe_posterior.cli import COMMANDS, main

HEAVY = {"torch", "lightning", "numpy", "yaml", "rich", "jsonargparse", "pyarrow", "transformers", "sklearn"}
HELP = [
    ["--help"],
    ["--version"],
    *([name, "--help"] for name in COMMANDS),
    ["benchmark", "lm", "--help"],
    *(["audit", name, "-h"] for name in ("show", "stats", "verify", "replay", "export", "watch")),
]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 300


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_no_help_imports_what_takes_seconds(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "moe_posterior.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported or len(arguments) == 1
    assert not imported & HEAVY


def test_what_a_help_lists_is_what_the_command_knows() -> None:
    from moe_posterior.benchmarks.lm.models import Recipe
    from moe_posterior.benchmarks.lm.stream import Plan
    from moe_posterior.benchmarks.routing.registry import GATES
    from moe_posterior.commands import benchmark, cache, lm, study
    from moe_posterior.training.cache import _parser as cache_parser
    from moe_posterior.training.study.plan import STUDIES

    assert tuple(GATES) == benchmark.GATES
    assert sorted(STUDIES) == list(study.STUDIES)
    assert (Recipe().layers, Recipe().steps, Plan().healthy) == (lm.LAYERS, lm.STEPS, lm.HEALTHY)
    shown = {option for action in cache.parser()._actions for option in action.option_strings}
    known = {option for action in cache_parser()._actions for option in action.option_strings}
    assert shown <= known


def test_the_package_loads_a_name_when_it_is_used_and_keeps_record_and_replay_functions() -> None:
    code = (
        "import sys, moe_posterior as package\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        "import moe_posterior.replay\n"
        "from moe_posterior import record, replay\n"
        "assert callable(record) and callable(replay) and callable(package.record)\n"
        "assert package.gates.PosteriorGate is package.PosteriorGate\n"
        "assert not hasattr(package, 'nothing_of_this_name')\n"
        "from moe_posterior import *\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_record_and_replay_are_the_same_functions_wherever_they_are_imported_from() -> None:
    ways = {
        "from moe_posterior import record, replay\n",
        "from moe_posterior.replay import record, replay\n",
        "from moe_posterior.replay.record import record\nfrom moe_posterior.replay.replay import replay\n",
    }
    for first in sorted(ways):
        code = "found = set()\n" + "".join(
            f"{way}found.add((record, replay))\n" for way in [first, *sorted(ways - {first})]
        )
        code += "((record, replay),) = found\nassert record.__name__ == 'record' and replay.__name__ == 'replay'\n"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_has_a_home() -> None:
    for name in moe_posterior.__all__:
        assert getattr(moe_posterior, name).__name__ == name


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "there is no command 'fitt'" in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['lightning'] = None; from moe_posterior.cli import main; sys.exit(main(['fit']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'moe-posterior[train]'" in result.stderr


SHADOWED_SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in ("rich", "lightning", "importlib.metadata")]


@pytest.mark.parametrize("name", ["yaml", "argparse", *SHADOWED_SELDOM])
def test_a_module_in_the_working_folder_does_not_pass_for_a_package(name: str, tmp_path: Path) -> None:
    spoiled = tmp_path / f"{name.partition('.')[0]}.py"
    spoiled.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    root = str(Path(moe_posterior.__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, "-m", "moe_posterior.cli", "evaluate", "--run", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 2, result.stderr
    assert "there is no run in nothing" in result.stderr
    assert not (tmp_path / "ran").exists()
