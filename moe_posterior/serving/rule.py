"""How a model turns its router's logits into a choice.

Dimensions: T tokens, E experts, k experts per token, G groups of experts.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels.reference import select

ScoringFunction = Literal["softmax", "sigmoid"]


class HostRule(NamedTuple):
    """How a model turns its router's logits into a choice, in vLLM's terms; the default is Mixtral's softmax top-k.

    >>> HostRule(scoring_func="sigmoid", num_expert_group=8, topk_group=4).scoring_func
    'sigmoid'
    """

    scoring_func: ScoringFunction = "softmax"
    num_expert_group: int = 1  # G; experts are chosen from the best topk_group of them
    topk_group: int = 1
    routed_scaling_factor: float = 1.0  # on the weights; 1 where the engine scales the experts' output itself
    e_score_correction_bias: Tensor | None = None  # (E,) added to the scores for choosing only

    def validate(self, num_experts: int) -> None:
        """Raise InvalidArgumentError unless the rule works with this many experts."""
        if self.scoring_func not in get_args(ScoringFunction):
            raise InvalidArgumentError(
                f"scoring_func must be one of {list(get_args(ScoringFunction))}; got {self.scoring_func!r}"
            )
        groups, kept = self.num_expert_group, self.topk_group
        if groups < 1 or num_experts % groups or not 1 <= kept <= groups:
            raise InvalidArgumentError(
                f"num_expert_group must divide {num_experts} experts and topk_group lie in [1, num_expert_group]; "
                f"got {groups} and {kept}"
            )
        bias = self.e_score_correction_bias
        if bias is not None and tuple(bias.shape) != (num_experts,):
            raise InvalidArgumentError(
                f"e_score_correction_bias must have shape ({num_experts},); got {tuple(bias.shape)}"
            )


def choose(
    logits: Tensor,  # (T, E) float32
    first: Tensor,  # (T,) int64
    topk: int,
    renormalize: bool,
    rule: HostRule,
    evidence: Tensor | None = None,  # (T, E), the part of the logits that is evidence: at most 0
) -> tuple[Tensor, Tensor]:  # (T, k) float32, (T, k) int32
    """A model's own choice from its logits; exact ties go to the first expert counting up from ``first``, wrapping around.

    A correction that is added to the scores for choosing only, such as DeepSeek-V3's load balancing, fades to the lowest
    correction of all for an expert that evidence speaks against, as it does in a swapped model.

    >>> weights, ids = choose(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0]), 2, True, HostRule())
    >>> ids.tolist(), [round(weight, 3) for weight in weights[0].tolist()]
    ([[1, 2]], [0.731, 0.269])
    """
    scores = torch.softmax(logits, dim=-1) if rule.scoring_func == "softmax" else logits.sigmoid()
    correction = rule.e_score_correction_bias
    ranking = logits  # the same order as the scores, and still distinct where those round to the same value
    if correction is not None or rule.num_expert_group > rule.topk_group:
        ranking = scores if correction is None else scores + correction.float()
        outside = _outside_best_groups(ranking, rule, corrected=correction is not None)
        if correction is not None and evidence is not None:
            ranking = ranking + (1 - evidence.clamp(max=0.0).exp()) * (correction.float().min() - correction.float())
        ranking = ranking.masked_fill(outside | (logits == -torch.inf), -torch.inf)
    ids = select(ranking, first, topk).expert_indices
    weights = scores.gather(1, ids)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
    return weights * rule.routed_scaling_factor, ids.int()


def _outside_best_groups(ranking: Tensor, rule: HostRule, corrected: bool) -> Tensor:  # (T, E) -> (T, E) bool
    """A group is ranked by its best expert, or, with a correction, by the sum of its best two."""
    groups = ranking.unflatten(1, (rule.num_expert_group, -1))
    best = groups.topk(min(2, groups.shape[-1]) if corrected else 1, dim=-1).values.sum(dim=-1)
    kept = select(best, torch.zeros_like(best[:, 0], dtype=torch.int64), rule.topk_group).expert_indices
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
    return outside[:, :, None].expand_as(groups).flatten(1)
