"""A run's folder: which arms share a warm-up, and what starting over removes."""

from pathlib import Path

import pytest
import yaml

from moe_posterior import InvalidArgumentError
from moe_posterior.training.runs import Run, read_experiment

ROBUST = "moe_posterior.training.methods.Robust"


def experiment(tmp_path: Path, **arms) -> Path:
    """An experiment file whose arms are given."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "arms": arms, "model": {"num_experts": 4}}))
    return path


def method(warmup: int, **more) -> dict:
    return {"model": {"method": {"class_path": ROBUST, "init_args": {"warmup_epochs": warmup, **more}}}}


def test_arms_that_differ_in_the_method_alone_share_a_warm_up(tmp_path) -> None:
    path = experiment(
        tmp_path, a=method(3), b={**method(3, eta=4.0), "branch_from": "a"}, c={**method(3), "branch_from": "b"}
    )
    read, run = read_experiment(path), Run(tmp_path / "run")
    assert run.origin(read, "a") is None
    assert [run.origin(read, arm).name for arm in ("b", "c")] == ["a", "a"]


@pytest.mark.parametrize("other", [method(2), {**method(3), "seed_everything": 1}, {"model": {"lr": 0.5}}])
def test_arms_that_share_no_warm_up_do_not_branch(tmp_path, other: dict) -> None:
    read = read_experiment(experiment(tmp_path, a=method(3), b={**other, "branch_from": "a"}))
    with pytest.raises(InvalidArgumentError, match=r"must differ in model\.method alone and warm up equally long"):
        Run(tmp_path / "run").origin(read, "b")


def test_an_arm_branches_from_one_before_it(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="branch_from must name an arm before 'a'"):
        read_experiment(experiment(tmp_path, a={**method(3), "branch_from": "b"}, b=method(3)))


def test_branches_survive_the_run_folder(tmp_path) -> None:
    read = read_experiment(experiment(tmp_path, a=method(3), b={**method(3), "branch_from": "a"}))
    run = Run(tmp_path / "run")
    with run.locked():
        run.prepare(read)
        run.prepare(read)
    assert run.experiment().branches == {"b": "a"}
    assert "branch_from" not in run.arm("b").config.read_text()


def test_starting_some_arms_over_leaves_the_others(tmp_path) -> None:
    read, run = read_experiment(experiment(tmp_path, a=method(3), b=method(4))), Run(tmp_path / "run")
    with run.locked():
        run.prepare(read)
        for arm in ("a", "b"):
            run.arm(arm).checkpoint.parent.mkdir()
            run.arm(arm).checkpoint.touch()
        run.prepare(read, overwrite=True, arms=["b"])
    assert run.arm("a").checkpoint.is_file()
    assert not run.arm("b").checkpoint.is_file()
