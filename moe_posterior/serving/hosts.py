"""Find the rule by which a swapped router chooses, by trying it.

Dimensions: T tokens, D hidden size, E experts, k experts per token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.huggingface.logits_bias import LogitsInterceptor
from moe_posterior.serving.rule import HostRule, ScoringFunction, choose

_PROBES = 128  # T
_SPREAD = 2.0  # standard deviation of the logits to try on: near 0 all rules give nearly the same weights
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_AGREEING = 0.9  # share of tokens that must get the same experts; low-precision logits tie, and tie-breaking differs


class _Logits(LogitsInterceptor):
    """Also keeps the product that it counts."""

    logits: Tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = self.products
        result = super().__torch_function__(func, types, args, kwargs)
        if self.products > before:
            self.logits = result.detach().clone()
        return result


@torch.no_grad()
def rule_of(name: str, router: SwappedRouter) -> HostRule:
    """The rule that turns the router's logits into what the router returns, tried on random hidden states.

    Raises:
        InvalidArgumentError: no rule that :class:`HostRule` can express does.
    """
    binding, gate = router.moe_posterior, router.posterior_gate
    kind = binding.original.__name__
    weight = next(router.parameters())
    hidden = torch.randn(_PROBES, gate.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        spread = _run(router, hidden)[0].std()
        if not spread > 0:
            raise InvalidArgumentError(
                f"router {name!r} must tell experts apart to find its rule; its logits are all equal"
            )
        logits, indices, weights = _run(router, hidden * (_SPREAD / spread))
    except (TypeError, RuntimeError, IndexError) as error:
        raise _unknown(name, kind, f"it cannot be run alone: {error}") from error
    for rule in _candidates(router, hidden):
        if any(_same(logits, indices, weights, rule, renormalize) for renormalize in (True, False)):
            return rule
    raise _unknown(name, kind, "neither softmax nor sigmoid top-k gives what it returns")


def _run(router: SwappedRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (T, D) -> (T, E), (T, k), (T, k)
    binding = router.moe_posterior
    with _Logits(len(hidden), binding.adapter.width(router), None, None) as interceptor:
        output = binding.original.forward(router, hidden)
    if interceptor.products != 1:
        raise RuntimeError(f"it computes {interceptor.products} products to logits")
    return interceptor.logits, *binding.adapter.read(router, output)


def _candidates(router: SwappedRouter, hidden: Tensor) -> Iterator[HostRule]:
    """A guess from the names of the router's attributes; the trial then checks it."""
    correction = router.moe_posterior.adapter.correction(router, (hidden,), {})
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    counts = [getattr(router, name, None) for name in ("num_group", "n_group")]
    groups, kept = next((count for count in counts if isinstance(count, int)), 1), getattr(router, "topk_group", 1)
    for scoring in get_args(ScoringFunction):
        if groups > 1 and isinstance(kept, int):
            yield HostRule(scoring, groups, kept, scale, correction)
        yield HostRule(scoring, routed_scaling_factor=scale, e_score_correction_bias=correction)


def _same(logits: Tensor, indices: Tensor, weights: Tensor, rule: HostRule, renormalize: bool) -> bool:
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    expected, ids = choose(logits.float(), first, indices.shape[1], renormalize, rule)
    tolerance = _TOLERANCE.get(weights.dtype, 1e-4)
    given, found = (part.float().sort(dim=1).values for part in (weights, expected))
    agreeing = (indices.sort(dim=1).values == ids.long().sort(dim=1).values).all(dim=1).float().mean()
    return torch.allclose(given, found, rtol=tolerance, atol=tolerance) and bool(agreeing >= _AGREEING)


def _unknown(name: str, kind: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the rule of router {name!r}, a {kind}, is not known: {reason}. Pass rule={{{name!r}: HostRule(...)}} if you know it"
    )
