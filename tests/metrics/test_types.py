"""The metrics' doors: one answer for every type that holds the values, our error for the rest, and never a number from a NaN."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_posterior import InvalidArgumentError, MoEPosteriorError
from moe_posterior import metrics as M

torchmetrics = pytest.importorskip("torchmetrics")

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
PREDS = torch.softmax(torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2, dim=1)
TARGET = torch.arange(40) % 3
GROUPS = torch.arange(40) % 4
CONFIDENCE = PREDS.amax(1)
CORRECT = (torch.arange(40) % 4 != 0).long()


def configured(ids: Any = GROUPS) -> M.Configurations:
    return M.configuration_ids(
        ids, ids[:, None] if not isinstance(ids, list) else [[i] for i in ids], 4, num_clusters=4
    )


# What takes class probabilities beside classes, and what takes confidences beside correctness.
OF_CLASSES: dict[str, Callable[[Any, Any], Any]] = {
    "calibration_error": M.calibration_error,
    "equal mass": lambda p, t: M.calibration_error(p, t, binning="equal_mass", debias=True),
    "classwise": M.classwise_calibration_error,
    "grouped": lambda p, t: M.grouped_calibration_error(p, t, GROUPS, 4).calibration_error,
    "configurations": lambda p, t: M.configuration_calibration(p, t, configured(GROUPS), min_count=1).gap,
    "rce_curve": lambda p, t: M.rce_curve(p, t, configured(GROUPS), [0.1], min_count=1).value,
    "cross-fitted": lambda p, t: M.cross_fitted_rce_curve(p, t, configured(GROUPS), [0.1], min_count=2),
    "brier": M.brier_score,
    "decomposition": lambda p, t: M.brier_decomposition(p, t).reliability,
    "nll": M.negative_log_likelihood,
    "reliability": lambda p, t: M.reliability_curve(p, t).accuracy,
    "smooth": M.smooth_calibration_error,
}
OF_CONFIDENCES = {
    name: OF_CLASSES[name] for name in ("calibration_error", "grouped", "configurations", "smooth", "reliability")
}
OF_RANKINGS: dict[str, Callable[[Any, Any], Any]] = {
    "aurc": M.aurc,
    "excess": M.excess_aurc,
    "curve": lambda c, k: M.risk_coverage(c, k)[1],
    "threshold": lambda c, k: M.action_threshold(c, k, 0.2).threshold,
    "risk": lambda c, k: M.selective_risk(c, k, 0.5).risk,
}


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_labels_of_every_integer_type_give_the_same_value(name: str) -> None:
    measure = OF_CLASSES[name]
    expected = measure(PREDS, TARGET)
    for kind in INTEGERS:
        same(measure(PREDS, TARGET.to(kind)), expected)
    for form in (TARGET.numpy().astype("uint16"), TARGET.tolist(), TARGET.repeat_interleave(2)[::2]):
        same(measure(PREDS, form), expected)
    same(measure(PREDS.numpy(), TARGET.numpy()), expected)
    same(measure(PREDS.T.contiguous().T, TARGET), expected)
    same(measure(PREDS.clone().requires_grad_(), TARGET), expected)
    with torch.inference_mode():
        same(measure(PREDS.clone(), TARGET.clone()), expected)


@pytest.mark.parametrize("name", OF_CONFIDENCES)
def test_correctness_of_every_type_gives_the_same_value(name: str) -> None:
    measure = OF_CONFIDENCES[name]
    expected = measure(CONFIDENCE, CORRECT)
    for kind in (*INTEGERS, torch.bool):
        same(measure(CONFIDENCE, CORRECT.to(kind)), expected)
    same(measure(CONFIDENCE.tolist(), CORRECT.bool().tolist()), expected)


@pytest.mark.parametrize("name", OF_RANKINGS)
def test_grades_and_scores_of_every_type_give_the_same_value(name: str) -> None:
    measure = OF_RANKINGS[name]
    ranks = torch.arange(40) % 7
    expected = measure(ranks.double(), CORRECT.double())
    for kind in (*INTEGERS, torch.float16, torch.bfloat16, torch.float32):
        same(measure(ranks.to(kind), CORRECT.to(kind)), expected)
    same(measure(ranks.numpy(), CORRECT.bool().numpy()), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_predictions_of_every_precision_are_read_as_the_values_they_hold(name: str, kind: torch.dtype) -> None:
    rounded = PREDS.to(kind)
    try:
        expected = OF_CLASSES[name](rounded.double(), TARGET)
    except InvalidArgumentError:  # rounding moved a sum too far for float64, not for the type itself
        return
    torch.testing.assert_close(OF_CLASSES[name](rounded, TARGET), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.5, -0.5])
def test_a_probability_that_is_none_is_refused_by_every_metric(wrong: float) -> None:
    broken, scores = PREDS.clone(), CONFIDENCE.clone()
    broken[3, 1] = wrong
    scores[3] = wrong
    for measure in OF_CLASSES.values():
        with pytest.raises(InvalidArgumentError):
            measure(broken, TARGET)
    for measure in OF_CONFIDENCES.values():
        with pytest.raises(InvalidArgumentError):
            measure(scores, CORRECT)
    with pytest.raises(InvalidArgumentError):
        M.human_divergence(broken, PREDS)
    with pytest.raises(InvalidArgumentError):
        M.human_divergence(PREDS, broken)
    with pytest.raises(InvalidArgumentError):
        M.shared_confidence(broken, configured())
    for measure in OF_RANKINGS.values():
        with pytest.raises(InvalidArgumentError):
            measure(CONFIDENCE, scores)
    if math.isnan(wrong):
        for measure in OF_RANKINGS.values():
            with pytest.raises(InvalidArgumentError):
                measure(scores, CORRECT)


@pytest.mark.parametrize(
    "wrong", [TARGET + 1, TARGET - 1, TARGET[:-1], TARGET[:, None], TARGET * 1j, "labels", None, 3, [["a"]]]
)
def test_labels_of_another_kind_are_refused_by_every_metric(wrong: Any) -> None:
    for measure in OF_CLASSES.values():
        with pytest.raises(MoEPosteriorError):
            measure(PREDS, wrong)
    for measure in OF_CLASSES.values():
        with pytest.raises(MoEPosteriorError):
            measure(wrong, TARGET)


@pytest.mark.parametrize("kind", INTEGERS)
def test_group_and_configuration_ids_of_every_integer_type_are_the_same(kind: torch.dtype) -> None:
    expected = M.grouped_calibration_error(PREDS, TARGET, GROUPS, 4)
    same(M.grouped_calibration_error(PREDS, TARGET, GROUPS.to(kind), 4).calibration_error, expected.calibration_error)
    same(M.grouped_calibration_error(PREDS, TARGET, GROUPS.tolist(), 4).count, expected.count)
    ids, table = configured(GROUPS.to(kind))
    assert (ids.tolist(), table.tolist()) == tuple(part.tolist() for part in configured())
    found = M.configuration_calibration(PREDS, TARGET, M.Configurations(ids.to(kind), table.to(kind)), min_count=1)
    same(found.gap, M.configuration_calibration(PREDS, TARGET, configured(), min_count=1).gap)


METRICS: dict[str, Callable[[], Any]] = {
    "grouped": lambda: M.GroupedCalibrationError(3),
    "grouped l2": lambda: M.GroupedCalibrationError(3, norm="l2"),
    "classwise": lambda: M.ClasswiseCalibrationError(3),
    "classwise max": lambda: M.ClasswiseCalibrationError(3, norm="max"),
}
BATCHES = {"first": (0, 0, 5, 40), "middle": (0, 5, 5, 40), "last": (0, 5, 40, 40), "only": (0, 0)}


def batches(cuts: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    groups = torch.arange(40) % 2
    return [{"preds": PREDS[a:b], "target": TARGET[a:b], "groups": groups[a:b]} for a, b in itertools.pairwise(cuts)]


def flat(value: Any) -> Any:
    return torch.cat([v.flatten() for v in value.values()]) if isinstance(value, dict) else value


@pytest.mark.parametrize("cuts", BATCHES.values(), ids=BATCHES.keys())
def test_a_collection_computes_what_each_metric_would_alone_wherever_the_empty_batch_comes(
    cuts: tuple[int, ...],
) -> None:
    for chosen in ([*METRICS], ["classwise", "grouped"], ["grouped", "classwise"]):
        together = torchmetrics.MetricCollection({name: METRICS[name]() for name in chosen})
        alone = {name: METRICS[name]() for name in chosen}
        for batch in batches(cuts):
            together.update(**batch)
            for metric in alone.values():
                metric.update(**metric._filter_kwargs(**batch))
        for name, metric in together.items(keep_base=True, copy_state=True):
            same(flat(metric.compute()), flat(alone[name].compute()))


def test_unlike_metrics_have_unlike_state_names_and_a_users_own_class_too() -> None:
    class Other(M.GroupedCalibrationError):
        """Adds up something else."""

    names = [set(metric._defaults) for metric in (METRICS["grouped"](), METRICS["classwise"](), Other(3))]
    assert all(len(own) == 3 for own in names)
    assert len(set.union(*names)) == 9
    assert set(METRICS["grouped l2"]()._defaults) == names[0], "alike metrics share theirs"


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_survives_casts_copies_pickles_and_inference_mode(name: str) -> None:
    first, second = batches((0, 5, 40))
    expected = METRICS[name]()
    kept = {key: value for key, value in expected._filter_kwargs(**first).items()}
    rest = {key: value for key, value in expected._filter_kwargs(**second).items()}
    expected.update(**kept)
    expected.update(**rest)
    with torch.inference_mode():
        metric = METRICS[name]()
        metric.update(**{key: value.clone() for key, value in kept.items()})
    for moved in (
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.set_dtype(torch.half),
    ):
        metric = moved(metric)
    metric.update(**rest)
    same(flat(metric.compute()), flat(expected.compute()))
    metric.reset()
    metric.update(**kept)


def test_every_torchmetrics_metric_of_ours_has_state_names_of_its_own() -> None:
    made = {
        kind: kind(n_bins=3) if kind is M.CalibrationError else kind(3)
        for kind in (M.CalibrationError, M.GroupedCalibrationError, M.ClasswiseCalibrationError)
    }
    assert set(made) == {
        kind
        for kind in map(M.__dict__.get, M.__all__)
        if isinstance(kind, type) and issubclass(kind, torchmetrics.Metric)
    }
    for one, other in itertools.combinations(made.values(), 2):
        assert not set(one._defaults) & set(other._defaults)


def test_a_broken_confidence_is_never_a_number_where_checks_are_off() -> None:
    metric = M.GroupedCalibrationError(1, validate_args=False)
    metric.update(torch.tensor([0.5, torch.nan]), torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert metric.compute()["calibration_error"].isnan().all()
    for bins in (M.bin_indices, M.equal_mass_bins):
        with pytest.raises(InvalidArgumentError, match="confidence must"):
            bins(torch.tensor([0.5, torch.nan]), 4)
        with pytest.raises(InvalidArgumentError, match="confidence must"):
            bins("abc", 4)


@pytest.mark.parametrize("kind", INTEGERS)
def test_sums_by_group_ids_of_every_integer_type_do_not_overflow(kind: torch.dtype) -> None:
    groups = torch.tensor([0, 99])
    sums = M.bin_sums(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), groups.to(kind), 100, 15)
    assert sums.count.sum(1).nonzero()[:, 0].tolist() == [0, 99]


FIGURES: dict[str, Callable[[Any], Any]] = {
    "wilson successes": lambda x: M.wilson_interval(x, torch.tensor([4.0]))[0],
    "wilson level": lambda x: M.wilson_interval(torch.tensor([1.0]), torch.tensor([4.0]), x)[0],
    "worst": lambda x: M.worst_group(x, torch.tensor([4.0])).value,
    "max_risk": lambda x: M.action_threshold(CONFIDENCE, CORRECT, x).risk,
    "threshold": lambda x: M.selective_risk(CONFIDENCE, CORRECT, x).risk,
    "rho": lambda x: M.reweighted_calibration_error(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.5]), x)[0],
    "gap": lambda x: M.reweighted_calibration_error(x, torch.tensor([1.0]), 0.1)[0],
    "eps": lambda x: M.negative_log_likelihood(PREDS, TARGET, eps=x),
    "bandwidth": lambda x: M.smooth_calibration_error(PREDS, TARGET, bandwidth=x),
    "decimals": lambda x: M.shared_confidence(PREDS, configured(), decimals=x).shared,
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("wrong", [math.nan, torch.tensor([math.nan]), "big", [None], 1j], ids=repr)
def test_a_figure_from_what_is_no_number_is_refused_or_nan(name: str, wrong: Any) -> None:
    try:
        value = FIGURES[name](wrong)
    except InvalidArgumentError:
        return
    assert torch.as_tensor(value).isnan().all()
