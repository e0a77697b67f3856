"""Every gate of any module is fitted and warm-started in one pass over data."""

from typing import Any

import pytest
import torch
from huggingface.models import D, batch, evidence, mixtral
from torch import Tensor, nn

from moe_posterior import (
    InvalidArgumentError,
    MixtureOfExperts,
    NotFittedError,
    PosteriorGate,
    PosteriorMoE,
    PriorGate,
    SoftmaxGate,
    fit_gates,
    record,
    swap_gates,
    warm_start_gates,
)
from moe_posterior.huggingface import swapped_gates

E, C = 4, 3


def experts() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(D, D) for _ in range(E)])


def layers(*gates: type, **options: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(MixtureOfExperts(experts(), kind(D, E, C, top_k=2, **options)) for kind in gates))


def rows(seed: int = 0, count: int = 60) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def square(model: nn.Module, given: Any) -> Tensor:
    return model(given).square().mean()


GATES = [(PosteriorGate, PosteriorGate), (PriorGate, PriorGate), (PosteriorGate, PriorGate), (PriorGate, PosteriorGate)]
FORMS = {
    "tensor": lambda given: given,
    "tuple": lambda given: (given, torch.zeros(len(given))),
    "mapping": lambda given: {"input": given},
}


@pytest.mark.parametrize("kinds", GATES)
@pytest.mark.parametrize("form", FORMS)
def test_all_layers_are_fitted_in_one_pass(kinds: tuple[type, ...], form: str) -> None:
    model = layers(*kinds)
    model.train()
    passes = []

    def data() -> Any:
        passes.append(1)
        yield from (FORMS[form](rows(seed)) for seed in range(4))

    fit_gates(model, data())
    assert len(passes) == 1
    assert all(layer.gate.fitted for layer in model)
    assert all(layer.gate.clusterer.fitted for layer in model)
    assert model.training
    assert not any(layer.gate._forward_hooks or "forward" in vars(layer.gate) for layer in model)
    with record(model) as trace:
        square(model, rows()).backward()
    trace.observe_gradients()
    assert all(evidence(layer.gate) > 0 for layer in model)


def test_a_second_pass_keeps_the_first_layer_and_fits_the_next_on_its_routing() -> None:
    model = layers(PosteriorGate, PosteriorGate)
    data = [rows(seed) for seed in range(4)]
    fit_gates(model, data)
    first = model[0].gate.clusterer.centroids.clone()
    fit_gates(model, data)
    assert torch.equal(model[0].gate.clusterer.centroids, first)
    expected = layers(PosteriorGate, PosteriorGate)
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = model[0](torch.cat(data))
    seen = model[1].gate.clusterer(hidden).cluster_ids
    assert len(seen.unique()) == C  # each of its clusters has tokens of the routing as it is


def test_a_swapped_model_is_fitted_as_by_its_own_method() -> None:
    one, other = mixtral(), mixtral()
    data = [batch(seed=seed, padded=3) for seed in range(4)]
    swap_gates(one, num_clusters=C).fit(data).warm_start(data)
    swap_gates(other, num_clusters=C)
    fit_gates(other, data)
    warm_start_gates(other, data)
    for (name, left), (_, right) in zip(swapped_gates(one), swapped_gates(other), strict=True):
        for key, tensor in left.state_dict().items():
            assert torch.equal(tensor, right.state_dict()[key]), (name, key)


def test_warm_start_measures_every_expert_in_every_cluster_and_changes_no_parameter() -> None:
    model = layers(PosteriorGate, PosteriorGate, temperature=0.5)
    data = [rows(seed) for seed in range(4)]
    fit_gates(model, data)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    alpha, beta = model[0].gate.posterior.initial_prior
    warm_start_gates(model, data, loss=square)
    for layer in model:
        added = (layer.gate.posterior.prior_alpha - alpha) + (layer.gate.posterior.prior_beta - beta)
        assert float(added[:C].min()) > 0
        assert float(added.sum()) == 4 * 60 * 2
        assert evidence(layer.gate) == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_max_tokens_stops_reading() -> None:
    read = []

    def data() -> Any:
        for seed in range(10):
            read.append(seed)
            yield rows(seed)

    fit_gates(layers(PosteriorGate), data(), max_tokens=100)
    assert len(read) == 2


def test_what_is_missing_is_said_and_nothing_changes() -> None:
    model = layers(PosteriorGate, PosteriorGate)
    with pytest.raises(InvalidArgumentError, match=r"at least 3 tokens .* gate '0\.gate' saw 2"):
        fit_gates(model, [rows(count=2)])
    with pytest.raises(InvalidArgumentError, match="no gate saw any"):
        fit_gates(model, [])
    with pytest.raises(InvalidArgumentError, match="must yield mappings"):
        fit_gates(model, ["text"])
    with pytest.raises(InvalidArgumentError, match="sample_size must"):
        fit_gates(model, [rows()], sample_size=0)
    assert not any(layer.gate.fitted or "forward" in vars(layer.gate) for layer in model)
    with pytest.raises(NotFittedError, match=r"gate '0\.gate' has no clusters yet"):
        warm_start_gates(model, [rows()], loss=square)
    fit_gates(model, [rows()])
    with pytest.raises(InvalidArgumentError, match="loss must be given"):
        warm_start_gates(model, [rows()])
    for wrong in (lambda model, given: model(given), lambda model, given: 1.0, lambda model, given: torch.zeros(())):
        with pytest.raises(InvalidArgumentError, match="loss must return a scalar tensor"):
            warm_start_gates(model, [rows()], loss=wrong)
    for given in (3, None):
        with pytest.raises(InvalidArgumentError, match="dataloader must"):
            fit_gates(model, given)
    with pytest.raises(InvalidArgumentError, match="no gate saw any"):
        warm_start_gates(model, [], loss=square)
    plain = MixtureOfExperts(experts(), SoftmaxGate(D, E, top_k=2))
    with pytest.raises(InvalidArgumentError, match="at least one gate with a belief"):
        fit_gates(plain, [rows()])


def test_a_gate_that_no_token_reaches_is_named_and_left_alone() -> None:
    model = nn.ModuleDict(
        {"used": layers(PosteriorGate), "idle": PosteriorMoE(experts(), hidden_size=D, num_clusters=C)}
    )
    model.forward = lambda given: model["used"](given)
    with pytest.warns(UserWarning, match=r"idle\.gate"):
        fit_gates(model, [rows()])
    assert model["used"][0].gate.fitted
    assert not model["idle"].gate.fitted
