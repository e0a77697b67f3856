"""What the study trains: settings (data and what is held out), gates, methods, seeds; one combination is a cell.

Backbones are frozen in every setting: PACS and the comments come as features, and CIFAR-10H as the features of a network that plain ERM
trained, one a seed. What is trained, and compared, is the mixture of experts on them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from moe_posterior.gates import Gate, PosteriorGate, SoftmaxGate
from moe_posterior.training import methods
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.methods import Method
from moe_posterior.training.study.sources import BATCH_SIZE, PROJECTED, SOURCES

__all__ = ["GATES", "METHODS", "STUDIES", "Cell", "Study", "cells_of", "settings_of", "simulations_of"]

NUM_EXPERTS = 4  # as in the paper
LR, WEIGHT_DECAY = 3e-3, 1e-4  # the paper: 1e-3 at half the batch size and more epochs

GATES: dict[str, Callable[[int, int], Gate]] = {
    # Fully soft with a hidden layer of 128, as in the paper; of one expert nothing is left of it.
    "softmax": lambda size, experts: SoftmaxGate(size, experts, experts, router_width=128),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 16, min(2, experts)),
}
METHODS: dict[str, Callable[[int], Method]] = {
    "vanilla": methods.Vanilla,
    "robust": methods.Robust,
    "robust, detached": partial(methods.Robust, detach_weights=True),
    "robust filtered": methods.RobustFiltered,
    "robust filtered, quantile .8": partial(methods.RobustFiltered, quantile=0.8),
    "fgr": methods.FGR,
    "fgr + robust": partial(methods.FGR, base="robust"),
    "group dro": methods.GroupDRO,
    "mmce": methods.MMCE,
    "soft ece": methods.SoftECE,
    "robust configuration": methods.RobustConfiguration,
    "robust configuration + robust": partial(methods.RobustConfiguration, robust=True),
}
SINGLE = "single"  # one expert, ERM
PUBLISHED = ("single", "vanilla", "mocae", "fgr", "robust", "robust filtered", "fgr + robust")
SIMULATED = ("robust filtered", "robust configuration + robust")  # also trained under simulated shift


@dataclass(frozen=True)
class Study:
    """One data set: its settings and how long heads are trained."""

    name: str
    settings: tuple[str, ...]
    seeds: int
    epochs: int
    warmup_epochs: int
    inner: Mapping[str, tuple[str, ...]]  # setting -> what is left out once more to simulate a shift


_PACS = ("art_painting", "cartoon", "photo", "sketch")
STUDIES = {
    "pacs": Study("pacs", _PACS, 5, 15, 6, {held: tuple(d for d in _PACS if d != held) for held in _PACS}),
    "comments": Study("comments", ("identities",), 5, 12, 5, {"identities": ("male", "female", "black", "muslim")}),
    "cifar10h": Study("cifar10h", ("hard",), 3, 8, 3, {}),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    study: str
    setting: str
    gate: str
    method: str
    seed: int
    inner: str | None = None  # left out of the training rows as well: a simulated shift

    @property
    def key(self) -> str:
        """Its name as a file."""
        parts = (self.setting, self.inner or "", self.gate, self.method, str(self.seed))
        return "--".join(part.replace(" ", "_").replace(",", "").replace("+", "and") for part in parts)

    @property
    def num_experts(self) -> int:
        """E."""
        return 1 if self.method == SINGLE else NUM_EXPERTS

    def data(self) -> ClassificationData:
        """Its rows."""
        return SOURCES[self.study](self.setting, self.seed, self.inner)

    def objective(self, warmup_epochs: int) -> Method:
        """Its method, with the warm-up all share."""
        return METHODS["vanilla" if self.method == SINGLE else self.method](warmup_epochs)

    def gate_factory(self) -> Callable[[int, int], Gate]:
        """Its gate."""
        return GATES[self.gate]


def cells_of(study: Study, seeds: range) -> Iterator[Cell]:
    """Every cell, vanilla first within a setting, gate and seed: the others branch from its warm-up."""
    for seed in seeds:
        for setting in study.settings:
            yield Cell(study.name, setting, "softmax", SINGLE, seed)
            for gate in GATES:
                for method in METHODS:
                    yield Cell(study.name, setting, gate, method, seed)


def simulations_of(study: Study, seeds: range) -> Iterator[Cell]:
    """The cells that simulate a shift, for calibrators to learn from."""
    for seed in seeds:
        for setting in study.settings:
            for gate in GATES:
                for method in SIMULATED:
                    for inner in study.inner.get(setting, ()):
                        yield Cell(study.name, setting, gate, method, seed, inner)


def settings_of(study: Study) -> dict[str, Any]:
    """What a trained cell depends on besides its own name, as it is written beside the cells and their figures."""
    return {
        "epochs": study.epochs,
        "warmup_epochs": study.warmup_epochs,
        "batch_size": BATCH_SIZE,
        "projected": PROJECTED if study.name == "pacs" else None,
        "learning_rate": LR,
        "weight_decay": WEIGHT_DECAY,
        "experts": NUM_EXPERTS,
    }
