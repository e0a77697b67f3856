"""A prior that depends on the token: what a small map of the hidden state expects of every expert, before any outcome.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior import beta as beta_functions
from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.baselines import MOST_WIDTH
from moe_posterior.gates.exploration import generator_for
from moe_posterior.precision import FixedPrecision

Scale = Literal["odds", "competence"]
_EDGES = {"odds": 0.02, "competence": 1e-6}  # m stays this far from 0 and 1: no prior is surer, and a Beta has spread
_RMS_EPS = 1e-6


class LearnedPrior(FixedPrecision):
    """The prior mean of each expert's competence on a token, ``m = sigmoid(z)``, for :class:`~moe_posterior.PosteriorGate`.

    z is the map of ``h / rms(h)``. By default experts are ranked by z plus the shift in log odds that the evidence causes, and
    weighted by ``softmax(g z / temperature)``: without evidence, a softmax gate whose logits are expectations. g ≤ 1 flattens
    the weights of a novel token, by its angle to the clusters; it never changes the choice.

    A gate with such a prior believes, of expert e on a token x in cluster c, ``Beta(κ m_e(x) + S[c, e], κ (1 - m_e(x)) + F[c, e])``:
    the map says what to expect, the evidence S, F since then overrules it. The map learns from the experts' own outcomes, by
    :meth:`PosteriorGate.loss`, and end to end through the routing weights; κ, how many observations it is worth, is set by
    :meth:`PosteriorGate.learn_prior` on rows that the map was not trained on.

    Args:
        width: ReLU units of the hidden layer; 128 (default) is the router of *Toward Calibrated MoE Under Distribution Shift*. None is
            one linear map.
        strength: κ > 0 in observations; default 2. None lets ``learn_prior`` set it; until then it is the gate's
            ``prior_alpha + prior_beta``.
        shrinkage: the gate's option of that name, where the gate has none: after so many observations of an expert, its record of
            observed against expected outcomes moves its prior on every token half-way. None keeps clusters apart. Default 10: a
            broken expert is left after a few outcomes, in clusters too where it was not seen.
        weight: ≥ 0, of the log score in a training loss; default 1.
        own: ≥ 0, of the mean loss of every expert by itself, chosen or not, in a training loss; default 0.03. Without it the experts
            that are seldom chosen know too little to take over from one that breaks.
        scale: ``"odds"`` (default), as above. ``"competence"`` ranks and weights by the rule's score of the belief, as a gate
            without a learned prior does; with constant m it is that gate.
        floor: in (0, 1], the least g of scale ``"odds"``; g is ``(d* / d)²``, at most 1, d being one minus the cosine to the
            nearest centroid and d* its median over the rows of ``learn_prior``. 1 switches it off; default 0.3.
        draws: > 0. While the map is trained (before clusters are fitted, in training mode) the k experts are those with the highest
            draws from ``Beta(draws · m, draws · (1 - m))``, so that all experts are tried; weights and scores stay those of m. None
            (default) takes the highest m.
        warmup_epochs: ≥ 0; so many epochs all experts weigh the same while the map learns from their outcomes alone. Default 0.

    Raises:
        InvalidArgumentError: an argument out of range; the prior already belongs to a gate, or is used before it does.

    Source: the competence prior of *Bayesian Posterior Routing in Multi-Agent Systems*, made a function of the token.

    >>> from moe_posterior import PosteriorGate
    >>> gate = PosteriorGate(hidden_size=8, num_experts=4, prior=LearnedPrior(width=None))
    >>> gate(torch.ones(3, 8)).expert_indices.shape  # it routes from the map alone, before clusters are fitted
    torch.Size([3, 2])
    """

    map: nn.Sequential
    usual: Tensor  # () float32, d*; inf until learn_prior, when nothing is novel

    @as_declared
    def __init__(
        self,
        width: int | None = 128,
        strength: float | None = 2.0,
        *,
        shrinkage: float | None = 10.0,
        weight: float = 1.0,
        own: float = 0.03,
        scale: Scale = "odds",
        floor: float = 0.3,
        draws: float | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.width = None if width is None else validation.count("width", width, most=MOST_WIDTH)
        for name, value in (("strength", strength), ("shrinkage", shrinkage), ("draws", draws)):
            if value is not None and not 0.0 < value < float("inf"):
                raise InvalidArgumentError(f"{name} must be positive and finite, or None; got {value}")
        for name, value in (("weight", weight), ("own", own)):
            if not 0.0 <= value < float("inf"):
                raise InvalidArgumentError(f"{name} must be at least 0 and finite; got {value}")
        if not 0.0 < floor <= 1.0:
            raise InvalidArgumentError(f"floor must lie in (0, 1]; got {floor}")
        if warmup_epochs < 0:
            raise InvalidArgumentError(f"warmup_epochs must be at least 0; got {warmup_epochs}")
        self.strength, self.shrinkage, self.weight = strength, shrinkage, weight
        self.own, self.floor, self.draws, self.warmup_epochs = own, floor, draws, warmup_epochs
        self.scale: Scale = scale
        self.register_buffer("usual", torch.full((), torch.inf, dtype=torch.float32))
        self.epoch, self.step = 0, 0  # of the training, as the trainer says

    def bind(self, hidden_size: int, num_experts: int) -> None:
        """Make the map; called once, by the gate."""
        if "map" in self._modules:
            raise InvalidArgumentError(
                "prior must be a LearnedPrior that no other gate uses; this one already belongs to a gate"
            )
        with torch.inference_mode(False):  # trainable weights must be created outside inference mode
            if self.width is None:
                self.map = nn.Sequential(nn.Linear(hidden_size, num_experts))
            else:
                self.map = nn.Sequential(
                    nn.Linear(hidden_size, self.width), nn.ReLU(), nn.Linear(self.width, num_experts)
                )

    @property
    def warming_up(self) -> bool:
        """Whether the training is still in the epochs in which all experts weigh the same."""
        return self.epoch < self.warmup_epochs

    def logits(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, E) float32
        """Log odds of m; 0 for a row that holds NaN."""
        weight = self._output.weight
        hidden = normalised(hidden)
        logits = self.map(hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)).float()
        return torch.where(torch.isnan(logits), 0.0, logits)

    def forward(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, E) float64
        """m, the expected competence of every expert; differentiable."""
        return self.mean_of(self.logits(hidden))

    def mean_of(self, logits: Tensor) -> Tensor:  # float64
        """m of these log odds, away from 0 and 1."""
        return self.mean_at(logits, self.scale)

    @staticmethod
    def mean_at(logits: Tensor, scale: Scale) -> Tensor:  # float64
        """:meth:`mean_of`, of a prior of this scale."""
        edge = _EDGES[scale]
        return torch.sigmoid(logits.double()).clamp(edge, 1 - edge)

    def loss(self, hidden: Tensor, outcome: Tensor) -> Tensor:  # (N, D), (N, E) -> ()
        """The log score of m on observed outcomes, a mean over those; NaN is not observed. No gradient reaches ``hidden``.

        Proper: its expectation is lowest where m is the rate of success.
        """
        logits = self.logits(hidden.detach())
        wanted = validation.outcomes("outcome", outcome, tuple(logits.shape)).detach().to(logits)
        seen = ~torch.isnan(wanted)
        score = functional.binary_cross_entropy_with_logits(logits, wanted.nan_to_num(0.0), reduction="none")
        return torch.where(seen, score, 0.0).sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def drawn(self, mean: Tensor, seed: int) -> Tensor:  # (N, E) -> (N, E)
        """A draw of competence around m, to rank by while the map is trained; from (seed, training step) alone."""
        assert self.draws is not None
        step = torch.tensor(self.step)
        generator = generator_for(mean.device, seed, step, "route")
        centre = mean.clamp(1e-3, 1 - 1e-3)
        return beta_functions.thompson(self.draws * centre, self.draws * (1 - centre), generator)

    @torch.no_grad()
    def put_expert(self, place: int, mean: float, prior_from: Mapping[int, float] | None) -> None:
        """Give the expert at ``place``, which may be one more, a row of the map: its donors', averaged in log odds, or a constant.

        The parameters are new ones where the map grew: give them to the optimizer.
        """
        with torch.inference_mode(False), torch.no_grad():  # a new parameter outlives the block that it was made in
            self._put(place, mean, prior_from)

    def _put(self, place: int, mean: float, prior_from: Mapping[int, float] | None) -> None:
        last = self._output
        weight, bias = last.weight.new_zeros(last.in_features), torch.logit(last.bias.new_tensor(mean))
        if prior_from is not None:
            donors = [int(donor) for donor in prior_from]
            shares = last.weight.new_tensor([float(share) for share in prior_from.values()])
            shares = shares / shares.sum()
            weight, bias = shares @ last.weight[donors], shares @ last.bias[donors]
        if place == last.out_features:
            last.weight = nn.Parameter(torch.cat([last.weight, weight[None]]), last.weight.requires_grad)
            last.bias = nn.Parameter(torch.cat([last.bias, bias[None]]), last.bias.requires_grad)
            last.out_features += 1
        else:
            last.weight[place], last.bias[place] = weight, bias

    @property
    def _output(self) -> nn.Linear:
        if "map" not in self._modules:
            raise InvalidArgumentError(
                "prior must belong to a gate, which knows its sizes, before it is used; make one: PosteriorGate(..., prior=prior)"
            )
        last = self.map[-1]
        assert isinstance(last, nn.Linear)
        return last

    def extra_repr(self) -> str:
        given = "" if self.strength is None else f", strength={self.strength:g}"
        given += "" if self.draws is None else f", draws={self.draws:g}"
        return f"width={self.width}{given}"


def normalised(hidden: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """Rows of root mean square 1."""
    return functional.rms_norm(hidden, hidden.shape[-1:], eps=_RMS_EPS)


def log_odds(score: Tensor) -> Tensor:
    """Of a score, as sure as a prior may be."""
    edge = _EDGES["odds"]
    return torch.logit(score.clamp(edge, 1 - edge))


def cosine_distance(hidden: Tensor, centroids: Tensor) -> Tensor:  # (N, D), (C, D) -> (N,)
    """One minus the cosine to the centroid at the smallest angle.

    >>> round(cosine_distance(torch.tensor([[3.0, 3.0]]), torch.eye(2)).item(), 4)
    0.2929
    """
    with torch.autocast(hidden.device.type, enabled=False):
        cosine = functional.normalize(hidden.float(), dim=1) @ functional.normalize(centroids, dim=1).T
    return 1 - cosine.amax(dim=1)


def sharpness_of(distance: Tensor, usual: Tensor, floor: float) -> Tensor:  # (N,), () -> (N,)
    """``(usual / distance)²``, within [floor, 1]; the floor for a distance that is NaN.

    >>> sharpness_of(torch.tensor([0.1, 0.2, 0.4, 9.0]), torch.tensor(0.2), 0.1).tolist()
    [1.0, 1.0, 0.25, 0.10000000149011612]
    """
    tiny = torch.finfo(torch.float32).tiny
    return (usual / distance.clamp(min=tiny)).square().clamp(floor, 1.0).nan_to_num(floor)


def read_prior(prior: object) -> LearnedPrior | None:
    """A gate's ``prior`` argument as a module of its own.

    Raises:
        InvalidArgumentError: anything but None, "learned" or a LearnedPrior.
    """
    if prior is None or isinstance(prior, LearnedPrior):
        return prior
    if isinstance(prior, str) and prior == "learned":
        return LearnedPrior()
    raise InvalidArgumentError(f"prior must be None, 'learned' or a LearnedPrior; got {validation.described(prior)}")
