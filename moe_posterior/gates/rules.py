"""Decision rules: how what is believed of an expert becomes the score it is ranked by.

A rule is a small frozen object, ``rule(alpha, beta) -> scores``, elementwise over alpha and beta in any shape. It holds no state and
knows nothing of clusters or experts; a :class:`~moe_posterior.PosteriorGate` takes one as ``rule=``, or its parts one by one.

Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "From Posterior to Routing Decision".
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.errors import InvalidArgumentError

Score = Literal["lcb", "mean", "quantile", "thompson", "race"]
KNOBS = (
    "score",
    "risk_aversion",
    "credible_level",
    "temperature",
    "exploration",
)  # what a gate can change on the same belief


@dataclass(frozen=True)
class Rule(ABC):
    """What every rule has; ``score`` is its name as an option of a gate."""

    score: ClassVar[str]
    draws: ClassVar[bool] = False  # whether choices depend on more than alpha and beta

    @abstractmethod
    def __call__(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Score every cell; the shapes are alpha's and beta's, broadcast. Only rules that draw use the generator."""

    @property
    def options(self) -> dict[str, Any]:
        """The rule as a gate's own options.

        >>> LCB(2.0).options
        {'score': 'lcb', 'risk_aversion': 2.0}
        """
        return {"score": self.score, **asdict(self)}


@dataclass(frozen=True)
class LCB(Rule):
    """Lower confidence bound, mean − λ·std: prefers the proven over the promising.

    Args:
        risk_aversion: λ ≥ 0, in posterior standard deviations; 1 (default) is the paper's.

    Raises:
        InvalidArgumentError: λ below 0 or not finite.

    >>> one = torch.ones(())
    >>> round(LCB(1.0)(one, one).item(), 3), round(LCB(1.0)(6 * one, 6 * one).item(), 3)
    (0.211, 0.361)
    """

    risk_aversion: float = 1.0
    score: ClassVar[str] = "lcb"

    def __post_init__(self) -> None:
        if not 0.0 <= self.risk_aversion < float("inf"):
            raise InvalidArgumentError(f"risk_aversion must be at least 0 and finite; got {self.risk_aversion}")

    def __call__(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return beta_functions.lcb(alpha, beta, self.risk_aversion)


@dataclass(frozen=True)
class Race(LCB):
    """The lower bound once the bounds separate; until then a draw among those that may still be the best.

    The scores are the bounds; who is drawn is decided by :mod:`moe_posterior.gates.race`. Default of
    :class:`~moe_posterior.PosteriorRouter`, which sees only the outcome of the expert it chose.
    """

    score: ClassVar[str] = "race"
    draws: ClassVar[bool] = True


@dataclass(frozen=True)
class Mean(Rule):
    """Posterior mean: for outcomes of all experts, where nothing needs to be explored.

    >>> Mean()(torch.tensor(3.0), torch.tensor(1.0)).item()
    0.75
    """

    score: ClassVar[str] = "mean"

    def __call__(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return beta_functions.mean(alpha, beta)


@dataclass(frozen=True)
class Quantile(Rule):
    """Exact lower credible bound: competence lies below it with probability ``credible_level``.

    Args:
        credible_level: in (0, 1); default 0.05.

    Raises:
        InvalidArgumentError: a level outside (0, 1).

    >>> round(Quantile(0.5)(torch.tensor(2.0), torch.tensor(2.0)).item(), 3)
    0.5
    """

    credible_level: float = 0.05
    score: ClassVar[str] = "quantile"

    def __post_init__(self) -> None:
        if not 0.0 < self.credible_level < 1.0:
            raise InvalidArgumentError(f"credible_level must lie in (0, 1); got {self.credible_level}")

    def __call__(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return beta_functions.quantile(alpha, beta, self.credible_level)


@dataclass(frozen=True)
class Thompson(Rule):
    """One draw of competence per cell: explores in proportion to the doubt. Without a generator the mean, around which it draws.

    Args:
        seed: of the gate's draws; default 0.
    """

    seed: int = 0
    score: ClassVar[str] = "thompson"
    draws: ClassVar[bool] = True

    def __call__(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return beta_functions.mean(alpha, beta)
        return beta_functions.thompson(alpha, beta, generator)


def rule_of(score: str, risk_aversion: float, credible_level: float, seed: int) -> Rule:
    """The rule that a gate's options name.

    Raises:
        InvalidArgumentError: an unknown name, or a value that the rule refuses.
    """
    if score in (LCB.score, Race.score):
        return (Race if score == Race.score else LCB)(risk_aversion)
    if score == Quantile.score:
        return Quantile(credible_level)
    if score == Thompson.score:
        return Thompson(seed)
    if score == Mean.score:
        return Mean()
    names = [rule.score for rule in (LCB, Mean, Quantile, Thompson, Race)]
    raise InvalidArgumentError(f"score must be one of {names}; got {score!r}")


def require_knobs(knobs: Mapping[str, Any], seed: int) -> None:
    """Check those of :data:`KNOBS` that are given; one that the named rule does not read is checked all the same.

    Raises:
        InvalidArgumentError: a value out of range.
    """
    standard = {"score": "lcb", "risk_aversion": 1.0, "credible_level": 0.05}
    rule = {name: knobs.get(name, value) for name, value in standard.items()}
    for score in {rule["score"], "lcb", "quantile"}:
        rule_of(score, rule["risk_aversion"], rule["credible_level"], seed)
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        "temperature": ("be positive and finite", lambda value: 0.0 < value < float("inf")),
        "exploration": ("lie in [0, 1)", lambda value: 0.0 <= value < 1.0),
    }
    for name, (wanted, fits) in ranges.items():
        if name in knobs and not fits(knobs[name]):
            raise InvalidArgumentError(f"{name} must {wanted}; got {knobs[name]}")
