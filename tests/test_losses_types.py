"""The losses' doors: one value for every type that holds the labels, our error for the rest, and NaN where NaN came."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_posterior import InvalidArgumentError, losses
from moe_posterior.losses import ConfigurationState

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
PROBS = torch.softmax(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), dim=1)
EXPERTS = torch.stack([PROBS, PROBS.flip(1)], dim=1)
WEIGHTS = torch.full((12, 2), 0.5)
TARGET = torch.arange(12) % 3
GROUPS = torch.arange(12) % 2


def adversary(probs: Any, target: Any, groups: Any = GROUPS) -> Tensor:
    state = ConfigurationState(torch.full((2,), 0.5), torch.full((2,), 0.2), torch.full((2,), 100.0))
    return losses.robust_config(probs, target, groups, state)[0]


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "nll": losses.nll,
    "per row": losses.nll_per_row,
    "robust": losses.robust,
    "regret": lambda p, t: losses.mixture_regret(p, EXPERTS, t),
    "filtered": lambda p, t: losses.robust_filtered(p, EXPERTS, WEIGHTS, t),
    "filtered by quantile": lambda p, t: losses.robust_filtered(p, EXPERTS, WEIGHTS, t, quantile=0.5),
    "mmce": losses.mmce,
    "soft ece": losses.soft_ece,
    "configurations": adversary,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_labels_of_every_integer_type_give_the_same_loss_and_gradient(loss: Callable[[Any, Any], Tensor]) -> None:
    def both(target: Any) -> tuple[Tensor, Tensor]:
        probs = PROBS.clone().requires_grad_()
        value = loss(probs, target)
        (gradient,) = torch.autograd.grad(value.sum(), probs)
        return value.detach(), gradient

    expected = both(TARGET)
    for given in [
        *(TARGET.to(kind) for kind in INTEGERS),
        TARGET.numpy(),
        TARGET.tolist(),
        TARGET.repeat_interleave(2)[::2],
    ]:
        for one, other in zip(both(given), expected, strict=True):
            assert torch.equal(one, other)


@every_loss
@pytest.mark.parametrize(
    "wrong", [TARGET + 1, TARGET - 1, TARGET.float(), TARGET.bool(), TARGET[:-1], "labels", None, [1.5] * 12]
)
def test_labels_of_another_kind_are_refused(loss: Callable[[Any, Any], Tensor], wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="target must"):
        loss(PROBS, wrong)


@every_loss
def test_probabilities_of_every_precision_are_taken_and_others_refused(loss: Callable[[Any, Any], Tensor]) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(
            loss(PROBS.to(kind), TARGET).double(), loss(PROBS.to(kind).float(), TARGET).double(), rtol=1e-5, atol=1e-5
        )
    for wrong in (PROBS * 1j, PROBS.long(), "probs", None, PROBS[:, 0], PROBS + 5, PROBS.clone().fill_(torch.inf)):
        with pytest.raises(InvalidArgumentError, match="probs must"):
            loss(wrong, TARGET)


@every_loss
def test_a_probability_that_is_nan_makes_the_loss_nan_and_never_a_number(loss: Callable[[Any, Any], Tensor]) -> None:
    broken = PROBS.clone()
    broken[3] = torch.nan
    assert loss(broken, TARGET).isnan().any()


def test_a_row_that_is_nan_does_not_hide_the_others_from_the_filter() -> None:
    experts = EXPERTS.clone()
    experts[0] = torch.nan
    mask = losses.filter_mask(PROBS, experts, WEIGHTS, TARGET, quantile=0.5)
    assert mask[1:].any()
    assert not mask[0]


@pytest.mark.parametrize("kind", INTEGERS)
def test_groups_and_configurations_of_every_integer_type_are_the_same(kind: torch.dtype) -> None:
    expected = losses.group_dro(PROBS[:, 0], GROUPS, torch.full((2,), 0.5))
    found = losses.group_dro(PROBS[:, 0], GROUPS.to(kind), torch.full((2,), 0.5))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(adversary(PROBS, TARGET, GROUPS.to(kind)), adversary(PROBS, TARGET))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, "big", None, True, torch.ones(2)])
def test_knobs_that_are_no_numbers_are_refused(wrong: Any) -> None:
    calls = [
        lambda: losses.robust(PROBS, TARGET, eta=wrong),
        lambda: losses.mmce(PROBS, TARGET, width=wrong),
        lambda: losses.soft_ece(PROBS, TARGET, temperature=wrong),
        lambda: losses.group_dro(PROBS[:, 0], GROUPS, torch.full((2,), 0.5), step=wrong),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
