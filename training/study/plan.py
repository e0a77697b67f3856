"""What the study trains: settings (data and what is held out), gates, methods, seeds; one combination is a cell.

CIFAR-10H is trained end to end, from pixels. PACS and the comments come as features of a pretrained network; a linear layer with batch
norm and ReLU on them is trained with the mixture, as in the paper's heads. All methods of a seed and gate branch from one ERM warm-up.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, PosteriorGate, SoftmaxGate
from moe_posterior.training import methods
from moe_posterior.training.backbones import ResNet, Trunk
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.methods import Method
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.study.ensemble import Members, MembersApart, average_gate, into_ensemble
from moe_posterior.training.study.sources import BATCH_SIZE, SOURCES, TRAIN_FRACTION

__all__ = ["GATES", "METHODS", "STUDIES", "Cell", "Study", "cells_of", "settings_of", "simulations_of"]

NUM_EXPERTS = 4  # as in the paper
BELIEF_GATES = ("posterior", "learned")
GATES: dict[str, Callable[[int, int], Gate]] = {
    # Fully soft with a hidden layer of 128, as in the paper; of one expert nothing is left of it.
    "softmax": lambda size, experts: SoftmaxGate(size, experts, experts, router_width=128),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 16, min(2, experts)),
    "learned": lambda size, experts: PosteriorGate(size, experts, 16, min(2, experts), prior="learned"),
    "average": average_gate,
}
METHODS: dict[str, Callable[[int], Method]] = {
    "vanilla": methods.Vanilla,
    # From the start, so that nothing branches from plain ERM: what a learned prior trains its experts with.
    "vanilla, own loss .03": lambda warmup_epochs: methods.Vanilla(0, expert_weight=0.03),
    "robust": methods.Robust,
    "robust, detached": partial(methods.Robust, detach_weights=True),
    "robust filtered": methods.RobustFiltered,
    "robust filtered, detached": partial(methods.RobustFiltered, detach_weights=True),
    "fgr": methods.FGR,
    "fgr + robust": partial(methods.FGR, base="robust"),
    "robust configuration + robust": partial(methods.RobustConfiguration, robust=True),
}
SINGLE = "single"  # one expert, ERM
ENSEMBLE = "ensemble"  # one network a head, trained apart
PUBLISHED = ("single", "vanilla", "mocae", "fgr", "robust", "robust filtered", "fgr + robust")
OURS = ("vanilla", "robust filtered", "robust configuration + robust")  # trained with a gate that holds a belief
ARMS = (
    ("softmax", SINGLE),
    ("average", ENSEMBLE),
    *(("softmax", method) for method in METHODS),
    *((gate, method) for gate in BELIEF_GATES for method in OURS),
)
"""(gate, method) of every cell of a setting and seed; vanilla before whatever branches from its warm-up."""
SIMULATED_SEEDS = 1


@dataclass(frozen=True)
class Study:
    """One data set: its settings, what is trained on it, and how long."""

    name: str
    settings: tuple[str, ...]
    seeds: int
    epochs: int
    warmup_epochs: int
    inner: Mapping[str, tuple[str, ...]]  # setting -> what is left out once more to simulate a shift
    backbone: Callable[[tuple[int, ...], int], nn.Module]  # (shape of an input row, members that share the cost of one)
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_share: float = 0.05  # of the learning rate
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


def small_resnet(shape: tuple[int, ...], members: int) -> nn.Module:
    """Half the paper's channels, one block a stage and a strided stem; the cost falls with the square of the width."""
    width = round(32 / members**0.5)
    return ResNet(widths=(width, 2 * width, 4 * width), blocks=(1, 1, 1), stem_stride=2)


def trunk(shape: tuple[int, ...], members: int) -> nn.Module:
    """The trainable layer on frozen features."""
    return Trunk(shape[0], 128 // members)


_PACS = ("art_painting", "cartoon", "photo", "sketch")
STUDIES = {
    "pacs": Study("pacs", _PACS, 5, 30, 12, {held: tuple(d for d in _PACS if d != held) for held in _PACS}, trunk),
    "comments": Study(
        "comments", ("identities",), 5, 30, 12, {"identities": ("male", "female", "black", "muslim")}, trunk
    ),
    "cifar10h": Study("cifar10h", ("hard",), 3, 20, 8, {}, small_resnet, 5e-3, 0.01, 0.2, "bf16-mixed"),
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
        if self.method == ENSEMBLE:
            return MembersApart()
        return METHODS["vanilla" if self.method == SINGLE else self.method](warmup_epochs)

    def model(self, study: Study, shape: tuple[int, ...], num_classes: int, num_groups: int) -> MoEClassifier:
        """Its network, untrained.

        Args:
            shape: of one input row.
        """

        def made(backbone: nn.Module) -> MoEClassifier:
            return MoEClassifier(
                backbone,
                num_classes,
                self.num_experts,
                self.gate_factory(),
                study.lr,
                study.weight_decay,
                study.warmup_share,
                method=self.objective(study.warmup_epochs),
                num_groups=num_groups,
                seed=self.seed,
            )

        if self.method != ENSEMBLE:
            return made(study.backbone(shape, 1))
        return into_ensemble(made(Members(lambda: study.backbone(shape, NUM_EXPERTS), NUM_EXPERTS)))

    def gate_factory(self) -> Callable[[int, int], Gate]:
        """Its gate."""
        return GATES[self.gate]


def arms_without(skipped: Collection[str]) -> list[tuple[str, str]]:
    """(gate, method) of every arm that names none of these.

    Raises:
        InvalidArgumentError: a name that no arm has, or nothing is left.
    """
    known = {name for arm in ARMS for name in arm}
    if unknown := sorted(set(skipped) - known):
        raise InvalidArgumentError(f"--skip must name gates or methods among {sorted(known)}; got {unknown}")
    kept = [arm for arm in ARMS if not set(arm) & set(skipped)]
    if not kept:
        raise InvalidArgumentError("--skip must leave something to train; it names every arm")
    return kept


def cells_of(study: Study, seeds: range, skipped: Collection[str] = ()) -> Iterator[Cell]:
    """Every cell, vanilla first within a setting, gate and seed: the others branch from its warm-up."""
    for seed in seeds:
        for setting in study.settings:
            for gate, method in arms_without(skipped):
                yield Cell(study.name, setting, gate, method, seed)


def simulations_of(study: Study, seeds: range, skipped: Collection[str] = ()) -> Iterator[Cell]:
    """The cells that simulate a shift, for calibrators to learn from and combinations to be chosen by: of the first seed."""
    for seed in seeds[:SIMULATED_SEEDS]:
        for setting in study.settings:
            for gate, method in arms_without(skipped):
                for inner in study.inner.get(setting, ()) if method in OURS else ():
                    yield Cell(study.name, setting, gate, method, seed, inner)


def settings_of(study: Study) -> dict[str, Any]:
    """What a trained cell depends on besides its own name, as it is written beside the cells and their figures."""
    return {
        "epochs": study.epochs,
        "warmup_epochs": study.warmup_epochs,
        "batch_size": BATCH_SIZE,
        "train_fraction": TRAIN_FRACTION if study.name == "cifar10h" else 1.0,
        "learning_rate": study.lr,
        "weight_decay": study.weight_decay,
        "experts": NUM_EXPERTS,
    }
