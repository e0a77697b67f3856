"""The metric class: batches, merging, devices and dtypes, processes."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from sklearn.naive_bayes import GaussianNB
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import GroupedCalibrationError, calibration_from_sums, curve_from_sums, reliability_curve


def digit_predictions() -> tuple[Tensor, Tensor, Tensor]:
    """Overconfident naive Bayes on digits, grouped by how much ink a digit has."""
    images, labels = load_digits(return_X_y=True)
    model = GaussianNB(var_smoothing=1e-3).fit(images[:900], labels[:900])
    ink = torch.tensor(images[900:]).sum(1)
    groups = torch.bucketize(ink, ink.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)))
    return torch.tensor(model.predict_proba(images[900:])).float(), torch.tensor(labels[900:]), groups


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    return digit_predictions()


def filled(*batches: tuple[Tensor, Tensor, Tensor]) -> GroupedCalibrationError:
    metric = GroupedCalibrationError(num_groups=4)
    for batch in batches:
        metric.update(*batch)
    return metric


def assert_same_result(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() == {"calibration_error", "accuracy", "confidence", "count"}
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, equal_nan=True)


def test_batches_of_any_size_give_the_result_of_one_pass_and_of_torchmetrics(digits: tuple) -> None:
    preds, target, groups = digits
    sizes = [63, 1, 0, 333, 500]
    metric = filled(*zip(preds.split(sizes), target.split(sizes), groups.split(sizes), strict=True))
    assert_same_result(metric.compute(), filled(digits).compute())
    for group in range(4):
        rows = groups == group
        expected = multiclass_calibration_error(preds[rows], target[rows], 10, 15).item()
        assert metric.compute()["calibration_error"][group].item() == pytest.approx(expected, abs=2e-6)


def test_two_halves_with_their_states_summed_equal_the_whole(digits: tuple) -> None:
    halves = [filled(tuple(part[rows] for part in digits)) for rows in (slice(0, 411), slice(411, None))]
    total = halves[0].bin_sums() + halves[1].bin_sums()
    torch.testing.assert_close(vars(total), vars(filled(digits).bin_sums()), rtol=0, atol=1e-12)
    assert_same_result(vars(calibration_from_sums(total)), filled(digits).compute())


def test_synchronising_two_replicas_sums_their_states(digits: tuple) -> None:
    here, there = (filled(tuple(part[rows] for part in digits)) for rows in (slice(0, 411), slice(411, None)))

    def gather(state: Tensor, group: object) -> list[Tensor]:
        name = next(name for name, own in here.metric_state.items() if own is state)
        return [state, there.metric_state[name]]

    here.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    torch.testing.assert_close(here.metric_state, filled(digits).metric_state, rtol=0, atol=1e-12)


def test_forward_returns_the_batch_and_accumulates_the_whole(digits: tuple) -> None:
    metric = GroupedCalibrationError(num_groups=4)
    first, second = (tuple(part[rows] for part in digits) for rows in (slice(0, 400), slice(400, None)))
    assert_same_result(metric(*first), filled(first).compute())
    assert_same_result(metric(*second), filled(second).compute())
    assert_same_result(metric.compute(), filled(digits).compute())


def test_the_state_stays_the_same_size_whatever_the_data(digits: tuple) -> None:
    metric = filled(digits, digits, digits)
    assert [tuple(state.shape) for state in metric.metric_state.values()] == [(4, 15)] * 3
    metric.reset()
    assert not any(state.any() for state in metric.metric_state.values())


def test_casting_the_model_around_it_leaves_the_counts_in_double(digits: tuple) -> None:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "metric": filled(digits)})
    expected = filled(digits).compute()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        cast(model)
        assert all(state.dtype == torch.float64 for state in model["metric"].metric_state.values())
    model["metric"]._computed = None
    assert_same_result(model["metric"].compute(), expected)
    assert model["layer"].weight.dtype == torch.float32, "the casts did reach the model"


def test_a_refused_batch_leaves_the_state_as_it_was(digits: tuple) -> None:
    preds, target, groups = digits
    metric = filled(digits)
    with pytest.raises(InvalidArgumentError, match="groups must lie in"):
        metric.update(preds, target, groups + 1)
    assert_same_result(metric.compute(), filled(digits).compute())


def test_a_pickled_metric_goes_on_where_it_stopped(digits: tuple) -> None:
    first, second = (tuple(part[rows] for part in digits) for rows in (slice(0, 400), slice(400, None)))
    metric = pickle.loads(pickle.dumps(filled(first)))
    metric.update(*second)
    assert_same_result(metric.compute(), filled(digits).compute())


def test_its_sums_draw_the_reliability_curve_of_a_group(digits: tuple) -> None:
    preds, target, groups = digits
    curve = curve_from_sums(filled(digits).bin_sums(), group=2)
    alone = reliability_curve(preds[groups == 2], target[groups == 2])
    torch.testing.assert_close(curve.high, alone.high, equal_nan=True)
    torch.testing.assert_close(curve.accuracy, alone.accuracy, equal_nan=True)


def test_it_shows_itself() -> None:
    assert repr(GroupedCalibrationError(3, norm="max")) == (
        "GroupedCalibrationError(num_groups=3, n_bins=15, norm='max', min_count=1)"
    )


def compute_on_one_of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = slice(0, 300) if rank == 0 else slice(300, None)  # ranks of unequal size
    torch.save(filled(tuple(part[rows] for part in digit_predictions())).compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_the_result_of_one(digits: tuple, tmp_path: Path) -> None:
    mp.spawn(compute_on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert_same_result(torch.load(tmp_path / f"{rank}.pt"), filled(digits).compute())
