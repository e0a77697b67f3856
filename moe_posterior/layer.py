"""A mixture-of-experts layer: a gate, experts, and the routing between them.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token, O output size.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import described
from moe_posterior.dispatch import combine, dispatch, run_experts
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import BeliefGate, Gate, PosteriorGate, PriorGate, Routing
from moe_posterior.precision import require_all_loadable


class MixtureOfExperts(nn.Module):
    """Any gate with any experts: ``forward = mix ∘ route``.

    Args:
        experts: an ``nn.ModuleList`` of modules ``(n, D) -> (n, O)`` that accept n = 0, or :class:`ExpertsFFN`.
        gate: the gate that chooses among them; its ``num_experts`` must be their number.

    Raises:
        InvalidArgumentError: no experts, or a number other than the gate expects.

    >>> from moe_posterior import SoftmaxGate
    >>> experts = nn.ModuleList([nn.Linear(8, 5) for _ in range(4)])
    >>> moe = MixtureOfExperts(experts, SoftmaxGate(hidden_size=8, num_experts=4, top_k=2))
    >>> moe(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 5])
    """

    @as_declared
    def __init__(self, experts: nn.ModuleList | ExpertsFFN, gate: Gate) -> None:
        super().__init__()
        if len(experts) != gate.num_experts:
            raise InvalidArgumentError(f"gate expects {gate.num_experts} experts; got {len(experts)}")
        self.experts, self.gate = experts, gate

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., O)
        """Route every token and mix its experts' outputs; any leading dimensions, also empty ones."""
        return self.mix(hidden, self.route(hidden))

    def route(self, hidden: Tensor) -> Routing:  # (..., D)
        """The gate's choice for every token, tokens flattened to N rows."""
        return self.gate(self._flatten(hidden))

    def mix(self, hidden: Tensor, routing: Routing) -> Tensor:  # (..., D) -> (..., O)
        """Run the chosen experts and sum their outputs by routing weight; the routing may come from anywhere."""
        tokens = self._flatten(hidden)
        if routing.expert_indices.shape[0] != tokens.shape[0]:
            raise InvalidArgumentError(
                f"routing must cover the {tokens.shape[0]} tokens of hidden; got {routing.expert_indices.shape[0]}"
            )
        order, counts = dispatch(routing.expert_indices, self.gate.num_experts)
        top_k = routing.expert_indices.shape[1]
        rows = tokens[order // top_k]
        if isinstance(self.experts, ExpertsFFN):
            outputs = self.experts(rows, counts)
        else:
            outputs = run_experts(list(self.experts), rows, counts)
        mixed = combine(outputs, order, routing.routing_weights)
        return mixed.reshape(*hidden.shape[:-1], mixed.shape[-1])

    def expert_outputs(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., E, O)
        """The output of every expert for every token, chosen or not: for judging experts one by one."""
        tokens = self._flatten(hidden)
        num_experts = self.gate.num_experts
        if isinstance(self.experts, ExpertsFFN):
            counts = torch.full((num_experts,), len(tokens), device=tokens.device)
            outputs = self.experts(tokens.repeat(num_experts, 1), counts)
            outputs = outputs.reshape(num_experts, len(tokens), outputs.shape[-1])
        else:
            outputs = torch.stack([expert(tokens) for expert in self.experts])
        outputs = outputs.transpose(0, 1)
        return outputs.reshape(*hidden.shape[:-1], *outputs.shape[1:])

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Tell the gate how the experts did; see :meth:`Gate.observe`."""
        self.gate.observe(routing, outcome, dense=dense)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        require_all_loadable(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _flatten(self, hidden: Tensor) -> Tensor:  # (..., D) -> (N, D)
        if not isinstance(hidden, Tensor) or hidden.layout != torch.strided:
            raise InvalidArgumentError(
                f"hidden must be a dense tensor of shape (..., {self.gate.hidden_size}); got {described(hidden)}"
            )
        if hidden.ndim < 1 or hidden.shape[-1] != self.gate.hidden_size:
            raise InvalidArgumentError(
                f"hidden must have shape (..., {self.gate.hidden_size}); got {tuple(hidden.shape)}"
            )
        return hidden.reshape(-1, self.gate.hidden_size)


class PosteriorMoE(MixtureOfExperts):
    """A mixture of experts behind a :class:`PosteriorGate`.

    Args:
        experts: an ``nn.ModuleList`` of modules ``(n, D) -> (n, O)``, or :class:`ExpertsFFN`.
        hidden_size: D.
        num_clusters: C; more clusters separate competence finer and need more evidence.
        top_k: k experts a token.
        gate: a gate that holds a belief, to be used as it is; None (default) makes a :class:`PosteriorGate` of the other options.
        gate_options: everything else :class:`PosteriorGate` takes: ``risk_aversion``, ``score``, ``temperature``, …

    >>> generator = torch.Generator().manual_seed(0)
    >>> hidden = torch.randn(64, 8, generator=generator)
    >>> experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    >>> moe = PosteriorMoE(experts, hidden_size=8, num_clusters=4, top_k=2)
    >>> moe.gate.fit(hidden)
    >>> routing = moe.route(hidden)
    >>> moe.observe(routing, torch.ones(64, 2))
    >>> float(moe.gate.posterior.successes.sum())
    128.0
    """

    gate: BeliefGate

    @as_declared
    def __init__(
        self,
        experts: nn.ModuleList | ExpertsFFN,
        hidden_size: int,
        num_clusters: int = 32,
        top_k: int = 2,
        *,
        gate: BeliefGate | None = None,
        **gate_options: Any,
    ) -> None:
        if gate is None:
            gate = PosteriorGate(hidden_size, len(experts), num_clusters, top_k, **gate_options)
        elif gate_options or gate.hidden_size != hidden_size:
            raise InvalidArgumentError(
                f"gate must have hidden_size={hidden_size} and comes with its own options; got "
                f"hidden_size={gate.hidden_size} and {sorted(gate_options)}"
            )
        super().__init__(experts, gate)

    @classmethod
    def from_softmax_moe(
        cls,
        block: nn.Module,
        num_clusters: int = 64,
        *,
        top_k: int | None = None,
        mode: Literal["prior", "replace"] = "prior",
        **gate_options: Any,
    ) -> "PosteriorMoE":
        """The same mixture as a trained softmax top-k block, with a belief about its experts; it shares the block's parameters.

        The block holds its experts as an ``nn.ModuleList`` named ``experts`` and its router as an ``nn.Linear`` named ``gate`` or
        ``router``. Put the result in the block's place, ``fit`` its gate and warm-start it. A block with its own router class, one
        that returns ``(logits, weights, indices)``, keeps that router and is swapped by :func:`~moe_posterior.swap_gates`.

        Args:
            block: maps ``(..., D)`` to ``(..., O)``, or to a tuple that begins with that.
            num_clusters: C.
            top_k: k; None (default) takes the block's ``top_k`` or ``num_experts_per_tok``.
            mode: ``"prior"`` (default) keeps the router's choice until evidence speaks against an expert; ``"replace"`` lets the
                belief alone choose.
            gate_options: everything else that :class:`PriorGate`, or :class:`PosteriorGate`, takes.

        Raises:
            InvalidArgumentError: a part is missing, or, in prior mode, the block's outputs on random inputs are not those of
                softmax over the k largest logits: it does something else besides.

        >>> block = nn.Module()
        >>> block.gate, block.top_k = nn.Linear(8, 4, bias=False), 2
        >>> block.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        >>> PosteriorMoE.from_softmax_moe(block, num_clusters=4, mode="replace").gate
        PosteriorGate(
          hidden_size=8, num_experts=4, top_k=2, score='lcb', risk_aversion=1
          (clusterer): Clusterer(num_clusters=4, hidden_size=8, fitted=False)
          (posterior): BetaPosterior(num_clusters=4, num_experts=4, observations=0)
        )
        """
        router, experts, k = _parts_of(block, top_k)
        sizes = (router.in_features, router.out_features, num_clusters, k)
        gate: BeliefGate
        if mode == "replace":
            gate = PosteriorGate(*sizes, **gate_options)
        elif mode == "prior":
            gate = PriorGate(*sizes, **gate_options, learned=False)
            gate.router = router
        else:
            raise InvalidArgumentError(f"mode must be 'prior' or 'replace'; got {mode!r}")
        moe = cls(experts, router.in_features, gate=gate.to(router.weight.device))
        moe.training = gate.training = block.training
        if mode == "prior":
            _validate_same_outputs(block, moe, router.weight)
        return moe


def _parts_of(block: nn.Module, top_k: int | None) -> tuple[nn.Linear, nn.ModuleList, int]:
    routers = [getattr(block, name, None) for name in ("gate", "router")]
    router = next((part for part in routers if isinstance(part, nn.Linear)), None)
    experts = getattr(block, "experts", None)
    if router is None or not isinstance(experts, nn.ModuleList):
        raise InvalidArgumentError(
            f"block must hold an nn.Linear named gate or router and an nn.ModuleList named experts; got "
            f"{ {name: type(part).__name__ for name, part in block.named_children()} }"
        )
    if any(parameter.is_meta for parameter in block.parameters()):
        raise InvalidArgumentError("block must not be on the meta device: load or materialise its parameters first")
    found = [top_k, getattr(block, "top_k", None), getattr(block, "num_experts_per_tok", None)]
    k = next((value for value in found if isinstance(value, int)), None)
    if k is None:
        raise InvalidArgumentError("top_k must be given: block has no attribute top_k or num_experts_per_tok")
    return router, experts, k


@torch.no_grad()
def _validate_same_outputs(block: nn.Module, moe: MixtureOfExperts, weight: Tensor) -> None:
    hidden = torch.randn(2, 32, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        theirs, ours = block(hidden), moe(hidden)
    finally:
        for module, training in modes.items():
            module.training = training
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    if not torch.isfinite(theirs).all():
        raise InvalidArgumentError("block must give finite outputs on random inputs; it gives NaN or inf")
    tolerance = 100 * torch.finfo(weight.dtype).eps
    if theirs.shape != ours.shape or not torch.allclose(
        theirs, ours, rtol=tolerance, atol=tolerance * float(ours.abs().max())
    ):
        raise InvalidArgumentError(
            "block must be a softmax over its k largest logits and a weighted sum of those experts' outputs, nothing else; "
            "its outputs on random inputs are not: give it a router class of its own and use swap_gates"
        )
