"""What a cell's outputs amount to: figures before and after every calibrator, under reweighting, and while outcomes trickle in.

Dimensions: n rows, K classes. Calibrators see validation rows alone, the shift-aware one also those of simulated shifts.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_posterior.calibrators import (
    Calibrator,
    ConfigurationCalibrator,
    ExpertTemperature,
    HistogramBinning,
    IsotonicCalibration,
    Multicalibration,
    MultiDomainTemperature,
    OnlineConfigurationCalibrator,
    Outputs,
    ShiftAwareTemperature,
    StructuredMatrixScaling,
    TemperatureScaling,
    VectorScaling,
    VennAbers,
)
from moe_posterior.metrics import (
    brier_score,
    calibration_error,
    human_divergence,
    negative_log_likelihood,
    noise_floor,
    rce_curve,
)
from moe_posterior.prediction import normalised, numbered_configurations
from moe_posterior.training.data import CIFAR10H
from moe_posterior.training.data.base import generator_for
from moe_posterior.training.study.plan import BELIEF_GATES, Cell
from moe_posterior.training.study.sources import CORRUPTED_SPLIT, SIMULATED_SPLIT

__all__ = ["DELIVERED", "RHOS", "figures_of_cell", "figures_of_simulation"]

Parts = Mapping[str, tuple[Outputs, Tensor]]
STATIC: dict[str, Callable[[], Calibrator]] = {
    "temperature": TemperatureScaling,
    "expert temperature": ExpertTemperature,
    "expert temperature, stopped": partial(ExpertTemperature, steps=50),
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "multi-domain temperature": MultiDomainTemperature,
    "configuration": ConfigurationCalibrator,
}
OUTSIDE: dict[str, Callable[[], Calibrator]] = {
    name: kind
    for name, library, kind in (
        ("matrix scaling", "probmetrics", StructuredMatrixScaling),
        ("Venn-Abers", "venn_abers", VennAbers),
        ("multicalibration", "mcgrad", Multicalibration),
    )
    if importlib.util.find_spec(library)  # extras: tables leave out what is not installed
}
PLAIN = ("single", "ensemble", "vanilla")  # what calibrators of other libraries are fitted on
RHOS = (0.0, 0.1, 0.5, 1.0)
DELIVERED = (0, 10, 20, 50, 100, 500)
JUDGED = 200  # rows that must be left to judge the online calibrator by
REWEIGHTED = ("none", "temperature", "configuration")
ORDERS = 5  # random orders of the outcomes


def figures_of_cell(cell: Cell, parts: Parts) -> list[dict[str, Any]]:
    """All figures that need no simulated shift, as records of one value each."""
    parts = {part: (_without_labels(cell, outputs), target) for part, (outputs, target) in parts.items()}
    plain = cell.method in PLAIN and cell.gate not in BELIEF_GATES
    calibrators = fit_static(*parts["val"], STATIC | OUTSIDE if plain else STATIC)
    found = [*_records(cell, "none", "validation", *parts["val"])]
    corrupted = [(CORRUPTED_SPLIT, parts[CORRUPTED_SPLIT])] if CORRUPTED_SPLIT in parts else []
    for subset, (outputs, target) in [*_subsets(cell, parts["test"]), *corrupted]:
        found += _records(cell, "none", subset, outputs, target)
        for name, calibrator in calibrators.items():
            found += _records(cell, name, subset, outputs._replace(probs=calibrator(outputs)), target)
        if subset in ("hard", "overall"):
            found += _online(cell, subset, calibrators["temperature"], parts["val"], outputs, target)
    return [*found, *_human(cell, parts, calibrators), *_reweighted(cell, parts, calibrators)]


def fit_static(
    outputs: Outputs, target: Tensor, kinds: Mapping[str, Callable[[], Calibrator]] = STATIC
) -> dict[str, Calibrator]:
    """Every calibrator that these rows allow: the one over domains wants at least two of them."""
    several = outputs.domain is not None and len(outputs.domain.unique()) > 1
    return {
        name: kind().fit(outputs, target)
        for name, kind in kinds.items()
        if several or name != "multi-domain temperature"
    }


def _without_labels(cell: Cell, outputs: Outputs) -> Outputs:
    """The groups of the objectives are the labels on CIFAR-10H and contain them on comments: no calibrator may read those."""
    assert outputs.domain is not None
    domain = {"pacs": outputs.domain, "comments": outputs.domain // 2, "cifar10h": torch.zeros_like(outputs.domain)}
    return outputs._replace(domain=domain[cell.study])


def figures_of_simulation(cell: Cell, parts: Parts, simulated: Sequence[Parts]) -> list[dict[str, Any]]:
    """Figures of the calibrators that learn from simulated shifts; none where nothing was simulated.

    Each simulation trained the same method without one more domain or group: its validation rows are unshifted, the rows left out
    are shifted. A plain temperature on the shifted rows stands beside: what assuming the level of the shift does. Features were scaled
    and projected before the rows were left out, so the simulated shift is a little milder than a real one. "adapted" reads the level of
    the shift from the unlabelled test rows themselves.
    """
    if not simulated:
        return []
    near, far = ([world[part] for world in simulated] for part in ("val", "simulated"))
    outputs, target = _joined(near + far, [0] * len(near) + list(range(1, len(far) + 1)))
    shift_aware = ShiftAwareTemperature().fit(outputs, target)
    assumed = TemperatureScaling().fit(*_joined(far, list(range(len(far)))))
    found = [*_choice(cell, simulated)]
    for subset, (rows, labels) in _subsets(cell, parts["test"]):
        for name, calibrated in (
            ("simulated temperature", assumed(rows)),
            ("shift-aware", shift_aware.adapt(rows.rows(torch.arange(0)))(rows)),
            ("shift-aware, adapted", shift_aware.adapt(rows)(rows)),
        ):
            found += _records(cell, name, subset, rows._replace(probs=calibrated), labels)
    return found


def _choice(cell: Cell, simulated: Sequence[Parts]) -> Iterator[dict[str, Any]]:
    """What every calibrator would have done under the simulated shifts, the mean over them: what combinations are chosen by."""
    totals: dict[tuple[str, str], float] = {}
    for world in simulated:
        parts = {part: (_without_labels(cell, outputs), target) for part, (outputs, target) in world.items()}
        outputs, target = parts[SIMULATED_SPLIT]
        for name, calibrator in [("none", None), *fit_static(*parts["val"]).items()]:
            probs = normalised(outputs.probs if calibrator is None else calibrator(outputs))
            accuracy = (probs.argmax(dim=1) == target).double().mean()
            for metric, value in (
                ("accuracy", accuracy),
                ("ece_debiased", calibration_error(probs, target, debias=True)),
            ):
                totals[name, metric] = totals.get((name, metric), 0.0) + float(value) / len(simulated)
    for (name, metric), total in totals.items():
        yield _record(cell, name, SIMULATED_SPLIT, metric, total)


def _joined(worlds: Sequence[tuple[Outputs, Tensor]], domains: Sequence[int]) -> tuple[Outputs, Tensor]:
    parts = [
        outputs._replace(domain=torch.full((len(target),), domain))
        for (outputs, target), domain in zip(worlds, domains, strict=True)
    ]
    return Outputs(*(torch.cat(column) for column in zip(*parts, strict=True))), torch.cat([t for _, t in worlds])


def _subsets(cell: Cell, test: tuple[Outputs, Tensor]) -> Iterator[tuple[str, tuple[Outputs, Tensor]]]:
    outputs, target = test
    for name, mask in cell.data().subsets().items():
        if name != "easy" and not (name == "overall" and cell.study == "pacs"):  # there both are the held-out domain
            yield name, (outputs.rows(mask), target[mask])


def _record(cell: Cell, calibrator: str, subset: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "study": cell.study,
        "setting": cell.setting,
        "gate": cell.gate,
        "method": cell.method,
        "calibrator": calibrator,
        "subset": subset,
        "metric": metric,
        "seed": cell.seed,
        "value": round(float(value), 6),
    }


def _records(cell: Cell, calibrator: str, subset: str, outputs: Outputs, target: Tensor) -> Iterator[dict[str, Any]]:
    probs = normalised(outputs.probs)
    for metric, value in (
        ("accuracy", (probs.argmax(dim=1) == target).double().mean()),
        ("ece", calibration_error(probs, target)),
        ("ece_debiased", calibration_error(probs, target, debias=True)),
        ("ece_floor", noise_floor(probs)),
        ("nll", negative_log_likelihood(probs, target)),
        ("brier", brier_score(probs, target)),
    ):
        yield _record(cell, calibrator, subset, metric, float(value))


def _online(
    cell: Cell, subset: str, static: Calibrator, validation: tuple[Outputs, Tensor], outputs: Outputs, target: Tensor
) -> Iterator[dict[str, Any]]:
    """Debiased ECE on rows whose outcome never arrives, after so many others' have; the mean over random orders."""
    count = len(target)
    longest = max((m for m in DELIVERED if m + JUDGED <= count), default=None)
    if longest is None:
        return
    totals = dict.fromkeys((m for m in DELIVERED if m <= longest), 0.0)
    correct = outputs.probs.argmax(dim=1) == target
    for order in range(ORDERS):
        rows = torch.randperm(count, generator=generator_for("online", cell.seed, order))
        judged, online = rows[longest:], OnlineConfigurationCalibrator(static).fit(*validation)
        shown = 0
        for delivered in totals:
            arrived = rows[shown:delivered]
            if len(arrived):
                online.observe(outputs.rows(arrived), correct[arrived])
            shown = delivered
            error = calibration_error(online(outputs.rows(judged)), target[judged], debias=True)
            totals[delivered] += float(error) / ORDERS
    for delivered, value in totals.items():
        yield _record(cell, "online", subset, f"ece_after_{delivered}", value)


def _human(cell: Cell, parts: Parts, calibrators: Mapping[str, Calibrator]) -> Iterator[dict[str, Any]]:
    """How far the aggregate is from the distribution of human labels, where people were asked."""
    if cell.study != "cifar10h":
        return
    outputs, _ = parts["test"]
    human = CIFAR10H().human_probs()
    for subset, mask in cell.data().subsets().items():
        for name in ("none", "temperature", "configuration"):
            probs = normalised(outputs.probs if name == "none" else calibrators[name](outputs))
            distance = human_divergence(probs[mask], human[mask].double())
            for metric, value in (("human_kl", distance.kl), ("human_brier", distance.brier)):
                yield _record(cell, name, subset, metric, float(value))


def _reweighted(cell: Cell, parts: Parts, calibrators: Mapping[str, Calibrator]) -> Iterator[dict[str, Any]]:
    """RCE(ρ) on rows of the training distribution: a shift that only changes how often configurations occur is simulated exactly.

    The test rows where they are of that distribution. PACS has none, so its validation rows are halved: fitted on one half, judged on
    the other, both ways.
    """
    if cell.study != "pacs":
        yield from _rce(cell, [(calibrators, *parts["test"])])
        return
    outputs, target = parts["val"]
    order = torch.randperm(len(target), generator=generator_for("halves", cell.seed))
    halves = (order[: len(order) // 2], order[len(order) // 2 :])
    worlds = []
    for fitted, judged in (halves, halves[::-1]):
        own = {name: STATIC[name]().fit(outputs.rows(fitted), target[fitted]) for name in REWEIGHTED[1:]}
        worlds.append((own, outputs.rows(judged), target[judged]))
    yield from _rce(cell, worlds)


def _rce(cell: Cell, worlds: Sequence[tuple[Mapping[str, Calibrator], Outputs, Tensor]]) -> Iterator[dict[str, Any]]:
    for name in REWEIGHTED:
        probs = torch.cat([outputs.probs if name == "none" else fitted[name](outputs) for fitted, outputs, _ in worlds])
        target = torch.cat([target for *_, target in worlds])
        ids = torch.cat([_configuration(outputs) for _, outputs, _ in worlds])
        curve = rce_curve(normalised(probs), target, numbered_configurations(ids), RHOS)
        for rho, value in zip(RHOS, curve.value.tolist(), strict=True):
            yield _record(cell, name, "training distribution", f"rce_{rho}", value)


def _configuration(outputs: Outputs) -> Tensor:
    assert outputs.configuration is not None
    return outputs.configuration
