"""One convention for every binned figure, against numpy: lower edges belong to a bin, and 1.0 to the last one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_posterior.benchmarks.routing import measures
from moe_posterior.bins import bin_edges, bin_indices, equal_mass_bins, place
from moe_posterior.calibrators import HistogramBinning, Outputs
from moe_posterior.metrics import (
    CalibrationError,
    ClasswiseCalibrationError,
    GroupedCalibrationError,
    brier_decomposition,
    calibration_error,
    classwise_calibration_error,
    grouped_calibration_error,
    reliability_curve,
)
from moe_posterior.prediction import Prediction
from moe_posterior.report import evaluate_predictions

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BINS = [1, 2, 3, 10, 15, 20, 64]


def edge_values(n_bins: int, dtype: torch.dtype) -> Tensor:
    """0, 1, every k / n_bins and the numbers of this type beside them, inside [0, 1]."""
    edges = (torch.arange(n_bins + 1, dtype=torch.float64) / n_bins).to(dtype)
    if dtype in (torch.float64, torch.float32):
        beside = [edges.nextafter(torch.zeros_like(edges)), edges.nextafter(torch.ones_like(edges))]
    else:
        beside = [edges * (1 - torch.finfo(dtype).eps), edges * (1 + torch.finfo(dtype).eps)]
    return torch.cat([edges, *beside]).clamp(0, 1)


def numpy_bins(values: Tensor, n_bins: int) -> np.ndarray:
    """Counted, not searched: how many inner edges a stored number has reached."""
    inner = np.array([k / n_bins for k in range(1, n_bins)])
    return (np.asarray(values.double())[:, None] >= inner).sum(1)


def numpy_ece(confidence: Tensor, correct: Tensor, n_bins: int, norm: str = "l1") -> float:
    bins, said, seen = numpy_bins(confidence, n_bins), confidence.double().numpy(), correct.double().numpy()
    parts = [(np.mean(bins == k), said[bins == k].mean() - seen[bins == k].mean()) for k in np.unique(bins)]
    if norm == "max":
        return max(abs(gap) for _, gap in parts)
    power = {"l1": 1, "l2": 2}[norm]
    return float(sum(share * abs(gap) ** power for share, gap in parts) ** (1 / power))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bins", BINS)
def test_every_number_on_or_beside_an_edge_falls_in_the_bin_that_numpy_counts(n_bins: int, dtype: torch.dtype) -> None:
    values = edge_values(n_bins, dtype)
    assert bin_indices(values, n_bins).tolist() == numpy_bins(values, n_bins).tolist()
    assert bin_indices(torch.tensor([0.0, 1.0], dtype=dtype), n_bins).tolist() == [0, n_bins - 1]
    exact = torch.arange(n_bins, dtype=torch.float64) / n_bins
    assert bin_indices(exact, n_bins).tolist() == list(range(n_bins))
    assert bin_edges(n_bins).tolist() == [k / n_bins for k in range(n_bins + 1)]


def through_report(confidence: Tensor, correct: Tensor, n_bins: int) -> list[float]:
    """The report's table, its curve, and its sums per configuration, of two-class probabilities with these confidences."""
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    one = Prediction(
        probs, target=1 - correct, arm="a", shift="clean", severity=0, cluster_ids=torch.zeros_like(correct)
    )
    report = evaluate_predictions([one], {}, resamples=2, n_bins=n_bins)
    [curve], [configuration] = report["reliability"], report["configurations"]
    bins = curve["bins"]
    drawn = sum(
        count * abs(said - seen)
        for count, said, seen in zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
        if count
    )
    return [curve["ece"], configuration["ece"], drawn / len(correct)]


def metric_of(metric: CalibrationError | GroupedCalibrationError, *batch: Tensor) -> Tensor:
    metric.update(*batch)
    found = metric.compute()
    return found if isinstance(found, Tensor) else found["calibration_error"].reshape(-1)[0]


ROUTES: dict[str, Callable[[Tensor, Tensor, int], list[float | Tensor]]] = {
    "plain": lambda c, y, b: [calibration_error(c, y, n_bins=b)],
    "grouped": lambda c, y, b: [grouped_calibration_error(c, y, torch.zeros_like(y), 1, b).calibration_error[0]],
    "metric": lambda c, y, b: [metric_of(CalibrationError(b), c, y)],
    "grouped metric": lambda c, y, b: [metric_of(GroupedCalibrationError(1, b), c, y, torch.zeros_like(y))],
    "benchmarks": lambda c, y, b: [measures.calibration_error(c, y, b)],
    "curve": lambda c, y, b: [curve_error(c, y, b)],
}


def curve_error(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    curve = reliability_curve(confidence, correct, n_bins)
    assert ((curve.lower <= curve.confidence) & (curve.confidence <= curve.upper))[curve.count > 0].all()
    return ((curve.accuracy - curve.confidence).abs().nan_to_num() * curve.count).sum() / curve.count.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_numpys_error_on_edge_values(route: str, dtype: torch.dtype) -> None:
    for n_bins in (3, 15):
        values = edge_values(n_bins, dtype)
        for seed in range(5):
            correct = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(seed))
            expected = numpy_ece(values, correct, n_bins)
            assert [float(x) for x in ROUTES[route](values, correct, n_bins)] == [pytest.approx(expected, abs=1e-12)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_report_gives_numpys_error_on_edge_values(dtype: torch.dtype) -> None:
    values = edge_values(15, dtype)
    values = values[values > 0.5]
    correct = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(0))
    assert through_report(values, correct, 15) == [pytest.approx(numpy_ece(values, correct, 15), abs=1e-12)] * 3


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_saturated_confidences_share_the_last_bin(norm: str) -> None:
    confidence, correct = torch.tensor([0.95, 1.0]), torch.tensor([0, 1])
    expected = numpy_ece(confidence, correct, 15, norm)
    assert expected == pytest.approx(0.475)
    assert calibration_error(confidence, correct, norm=norm).item() == pytest.approx(expected)
    for route in ROUTES.values():
        assert [float(x) for x in route(confidence, correct, 15)] == [pytest.approx(0.475)]


@pytest.mark.parametrize("seed", range(5))
def test_a_saturated_models_error_is_that_of_uncertainty_calibration_and_below_one_that_of_relplot(seed: int) -> None:
    package, relplot = pytest.importorskip("calibration"), pytest.importorskip("relplot.metrics")
    rng = np.random.default_rng(seed)
    confidence = np.concatenate(
        [rng.uniform(0.5, 1, 100), np.ones(60)]
    )  # no inner edge is met: theirs belong to the bin below
    correct = (rng.random(160) < np.where(confidence == 1, 0.6, confidence)).astype(np.int64)
    probs = np.stack([1 - confidence, confidence], axis=1)
    ours = calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct), n_bins=7).item()
    assert ours == pytest.approx(package.get_ece(probs, correct, num_bins=7, mode="top-label"), abs=1e-9)
    below = slice(0, 100)
    ours = calibration_error(torch.from_numpy(confidence[below]), torch.from_numpy(correct[below]), n_bins=7).item()
    assert ours == pytest.approx(relplot.binnedECE(confidence[below], correct[below], 7), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_classes_and_the_brier_score_are_binned_the_same_way(dtype: torch.dtype) -> None:
    values = edge_values(15, dtype)
    probs = torch.stack([values, 1 - values], dim=1)
    target = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(1))
    expected = np.mean([numpy_ece(probs[:, k], (target == k).long(), 15) for k in (0, 1)])
    assert classwise_calibration_error(probs, target).item() == pytest.approx(expected, abs=1e-12)
    metric = ClasswiseCalibrationError(2)
    metric.update(probs, target)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)
    bins = numpy_bins(values, 15)
    said, seen = values.double().numpy(), target.numpy()
    reliability = sum(np.mean(bins == k) * (said[bins == k].mean() - seen[bins == k].mean()) ** 2 for k in set(bins))
    assert brier_decomposition(values, target).reliability.item() == pytest.approx(reliability, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bins_of_equal_mass_and_a_fitted_histogram_hold_their_lower_edges_too(dtype: torch.dtype) -> None:
    values = edge_values(15, dtype)
    ordered = np.sort(np.asarray(values.double()))
    firsts = [chunk[0] for chunk in np.array_split(ordered, 8)][1:]
    expected = (np.asarray(values.double())[:, None] >= np.array(firsts)).sum(1)
    assert equal_mass_bins(values, 8).tolist() == expected.tolist()
    assert place(values, torch.tensor(firsts)).tolist() == expected.tolist()
    said = torch.tensor([0.6, 0.6, 0.8, 1.0], dtype=torch.float64)
    outputs = Outputs(torch.stack([said, 1 - said], dim=1))
    fitted = HistogramBinning(n_bins=2).fit(outputs, torch.tensor([1, 1, 0, 0]))
    assert fitted(outputs)[:, 0].tolist() == [0.5, 0.5, 1.0, 1.0], "0.8 is the lower edge of the upper bin"
