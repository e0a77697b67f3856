"""Every door by which a belief comes in refuses what no belief can be made of, by name, and leaves everything as it was."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_posterior import (
    BetaPosterior,
    Evidence,
    InvalidArgumentError,
    MixtureOfExperts,
    PosteriorGate,
    PosteriorRouter,
    PriorGate,
    ProxyNoise,
)
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.rebuild import restore
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.calibrators import OnlineConfigurationCalibrator, Outputs, TemperatureScaling
from moe_posterior.checks.soundness import require_sound
from moe_posterior.files.tensorfile import load_tensors, save_tensors
from moe_posterior.gates import BanditGate, NearestNeighbourGate
from moe_posterior.serving import export_routing, load_routing, save_routing, update_routing
from moe_posterior.serving.export import KIND

C, E, D = 3, 4, 5
HIDDEN = torch.randn(60, D, generator=torch.Generator().manual_seed(0))
BAD = {
    **{f"{name} {value}": (name, value) for name in ("successes", "failures") for value in (-1.0, math.nan, math.inf)},
    **{
        f"{name} {value}": (name, value)
        for name in ("prior_alpha", "prior_beta")
        for value in (0.0, -2.0, math.nan, math.inf)
    },
    **{f"trust {value}": ("trust", value) for value in (-0.1, 1.5, math.nan)},
    **{f"suspicion {value}": ("suspicion", value) for value in (-1.0, math.nan, math.inf)},
}
every_bad = pytest.mark.parametrize(("name", "value"), BAD.values(), ids=BAD)


def gate_of(kind: type, **options: Any) -> Any:
    gate = kind(D, E, C, 1, **options)
    gate.fit(HIDDEN)
    gate.posterior.observe(torch.arange(60) % C, torch.rand(60, E, generator=torch.Generator().manual_seed(1)))
    return gate


def spoil(table: Any, value: float) -> Any:
    """A copy whose last value is bad."""
    table = table.clone() if isinstance(table, Tensor) else table.copy()
    table.reshape(-1)[-1] = value
    return table


def spoiled(state: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    """A copy of a state in which the last table of that name is spoilt."""
    key = [key for key in state if key.split(".")[-1] == name][-1]
    return {**state, key: spoil(state[key], value)}


MODULES: dict[str, Callable[[], nn.Module]] = {
    "belief": lambda: gate_of(PosteriorGate).posterior,
    "posterior gate": lambda: gate_of(PosteriorGate),
    "prior gate": lambda: gate_of(PriorGate),
    "bandit": lambda: gate_of(BanditGate),
    "layer": lambda: MixtureOfExperts(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), gate_of(PosteriorGate)),
}


@every_bad
@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}], ids=str)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_load_state_dict(make: Callable[[], nn.Module], options: dict[str, bool], name: str, value: float) -> None:
    module, other = make(), make()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidArgumentError, match=rf"{name} must be .*; got {value:g} at"):
        module.load_state_dict(spoiled(other.state_dict(), name, value), **options)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def experienced_router(audit: AuditLog | None = None) -> PosteriorRouter:
    router = PosteriorRouter(E, D, C, audit=audit, max_pending=100)
    router.fit(HIDDEN.numpy())
    decided = router.route_batch(HIDDEN.numpy())
    router.resolve_batch(decided.ids[:30], np.linspace(0, 1, 30))
    return router


@every_bad
def test_a_routers_file(tmp_path: Path, name: str, value: float) -> None:
    router = experienced_router()
    router.save(tmp_path / "router")
    state = torch.load(tmp_path / "router", weights_only=True)
    state["gate"] = spoiled(state["gate"], name, value)
    torch.save(state, tmp_path / "router")
    with pytest.raises(InvalidArgumentError, match=rf"{name} must be"):
        PosteriorRouter.load(tmp_path / "router")


@every_bad
def test_a_checkpoint_of_an_audit_log(tmp_path: Path, name: str, value: float) -> None:
    with AuditLog(tmp_path) as log:
        experienced_router(log)
    checkpoint = [r for r in AuditLog(tmp_path, mode="r").read() if isinstance(r, Checkpoint)][-1]
    assert restore(checkpoint).gate.fitted
    arrays = spoiled(checkpoint.arrays, name, value)
    with pytest.raises(AuditError, match=rf"{name} must be"):
        restore(checkpoint._replace(arrays=arrays))


@every_bad
def test_a_belief_file_swapped_under_a_model(tmp_path: Path, name: str, value: float) -> None:
    pytest.importorskip("transformers")
    from model_survey.tiny import tiny_batch, tiny_model

    from moe_posterior import swap_gates
    from moe_posterior.huggingface import load_belief, save_belief, swapped_gates
    from moe_posterior.huggingface.saving import FILE
    from moe_posterior.huggingface.saving import KIND as BELIEF

    model = tiny_model("mixtral")
    swap_gates(model, num_clusters=C).fit([tiny_batch(model)])
    save_belief(model, tmp_path)
    tensors, header = load_tensors(tmp_path / FILE, BELIEF)
    save_tensors(tmp_path / FILE, spoiled(tensors, name, value), header)
    plain = tiny_model("mixtral")
    with pytest.raises(InvalidArgumentError, match=rf"{name} must be"):
        load_belief(plain, tmp_path)
    assert not dict(swapped_gates(plain))


SERVED = [
    ("evidence_bias", math.nan),
    ("evidence_bias", math.inf),
    ("topk_weights", -1.0),
    ("topk_weights", math.nan),
    ("topk_weights", math.inf),
    ("topk_scores", math.nan),
    ("topk_scores", math.inf),
    ("topk_indices", -1),
    ("topk_indices", E),
]


@pytest.mark.parametrize(("name", "value"), SERVED)
def test_an_exported_routing(tmp_path: Path, name: str, value: float) -> None:
    gate = gate_of(PriorGate if name == "evidence_bias" else PosteriorGate)
    experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])
    functions = export_routing(MixtureOfExperts(experts, gate))
    save_routing(functions, tmp_path / "routing")
    tensors, header = load_tensors(tmp_path / "routing", KIND)
    save_tensors(tmp_path / "routing", spoiled(tensors, name, value), header)
    before = {key: copy.deepcopy(function.state_dict()) for key, function in functions.items()}
    for use in (lambda: load_routing(tmp_path / "routing"), lambda: update_routing(functions, tmp_path / "routing")):
        with pytest.raises(InvalidArgumentError, match=f"{name} must"):
            use()
    function = functions["gate"]
    with pytest.raises(InvalidArgumentError, match=f"{name} must"):
        function.load_state_dict(spoiled(function.state_dict(), name, value))
    for key, table in function.state_dict().items():
        torch.testing.assert_close(table, before["gate"][key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["successes", "failures"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
def test_merge_and_a_warm_start_from_counts(name: str, value: float) -> None:
    gate = gate_of(PriorGate)
    counts = {key: torch.ones(C, E, dtype=torch.float64) for key in ("successes", "failures")}
    counts[name] = spoil(counts[name], value)
    before = copy.deepcopy(gate.state_dict())
    for use in (
        lambda: gate.posterior.merge(Evidence(**counts)),
        lambda: gate.warm_start_from_counts(counts["successes"], counts["failures"]),
    ):
        with pytest.raises(
            InvalidArgumentError, match=rf"{name} must be finite and at least 0; got {value:g} at \(2, 3\)"
        ):
            use()
        assert all(torch.equal(tensor, before[key]) for key, tensor in gate.state_dict().items())


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, 5e-324])
def test_a_warm_start_that_leaves_no_prior(strength: float) -> None:
    router = experienced_router()
    before = copy.deepcopy(router.gate.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"strength must be|prior_alpha must be|prior_beta must be"):
        router.warm_start(HIDDEN.numpy(), np.full((60, E), 0.5), strength=strength)
    assert all(torch.equal(tensor, before[key]) for key, tensor in router.gate.state_dict().items())


@pytest.mark.parametrize("value", [-0.5, 1.5, math.inf, -math.inf])
def test_a_warm_start_from_outcomes_that_are_none(value: float) -> None:
    router = experienced_router()
    before = copy.deepcopy(router.gate.state_dict())
    with pytest.raises(InvalidArgumentError, match="outcome"):
        router.warm_start(HIDDEN.numpy(), spoil(np.full((60, E), 0.5), value))
    assert all(torch.equal(tensor, before[key]) for key, tensor in router.gate.state_dict().items())


@pytest.mark.parametrize(
    ("donors", "strength"),
    [({0: 1.0}, s) for s in (0.0, -1.0, math.nan, math.inf, 5e-324)]
    + [({0: w}, 4.0) for w in (0.0, -1.0, math.nan, math.inf)]
    + [({E: 1.0}, 4.0), ({-1: 1.0}, 4.0)],
)
def test_an_inherited_prior_that_is_none(donors: dict[int, float], strength: float) -> None:
    router = experienced_router()
    before = copy.deepcopy(router.gate.state_dict())
    for use in (
        lambda: router.add_expert(donors, strength=strength),
        lambda: router.replace_expert(1, donors, strength=strength),
    ):
        with pytest.raises(InvalidArgumentError, match=r"prior_from|inherited (alpha|beta)"):
            use()
        assert router.gate.num_experts == router.posterior.num_experts == E
        assert all(torch.equal(tensor, before[key]) for key, tensor in router.gate.state_dict().items())


@pytest.mark.parametrize("column", ["alpha", "beta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_posterior_rows_of_an_audit_log(tmp_path: Path, column: str, value: float) -> None:
    from moe_posterior.audit.belief import BeliefState
    from moe_posterior.audit.storage.tables import Group

    with AuditLog(tmp_path) as log:
        router = experienced_router(log)
        router.route_batch(HIDDEN.numpy())
    records = list(AuditLog(tmp_path, mode="r").read())
    checkpoint = next(r for r in records if isinstance(r, Checkpoint))
    group = next(r for r in records if isinstance(r, Group) and r.rows("posterior"))
    with pytest.raises(AuditError, match=f"{column} must be positive and finite"):
        BeliefState(checkpoint._replace(arrays={**checkpoint.arrays, column: spoil(checkpoint.arrays[column], value)}))
    cells = {**group.tables["posterior"], column: spoil(group.tables["posterior"][column], value)}
    with pytest.raises(AuditError, match=f"{column} must be positive and finite"):
        BeliefState(checkpoint).advance(group._replace(tables={**group.tables, "posterior": cells}))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_an_online_calibrator_and_a_memory_of_outcomes_have_seen(value: float) -> None:
    outputs = Outputs(torch.tensor([[0.9, 0.1]] * 10))
    online = OnlineConfigurationCalibrator(TemperatureScaling(), strength=30.0).fit(
        outputs, torch.tensor([0] * 9 + [1])
    )
    online.observe(outputs, torch.ones(10))
    memory = NearestNeighbourGate(D, E, 1, num_neighbours=3)
    memory.warm_start(HIDDEN, torch.full((60, E), 0.5))
    for module, name in ((online, "failures"), (memory, "outcomes")):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(InvalidArgumentError, match=f"{name} must be"):
            module.load_state_dict(spoiled(module.state_dict(), name, value))
        assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_counts_that_are_debiased_may_be_below_zero_while_they_are_few() -> None:
    noisy, other = (BetaPosterior(C, E, noise=ProxyNoise(0.2, 0.1)) for _ in range(2))
    noisy.observe(torch.tensor([0]), torch.zeros(1, E))
    assert noisy.successes.min() < 0
    other.load_state_dict(noisy.state_dict())
    other.merge(noisy)
    assert torch.equal(other.successes, 2 * noisy.successes)
    with pytest.raises(InvalidArgumentError, match=r"other\.successes must be finite and at least 0"):
        BetaPosterior(C, E).merge(noisy)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(InvalidArgumentError, match="successes must be finite"):
            other.load_state_dict(spoiled(noisy.state_dict(), "successes", value))


def test_every_dtype_is_looked_at_and_complex_numbers_are_refused() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64):
        require_sound({"successes": torch.ones(2, 2, dtype=dtype)})
        with pytest.raises(InvalidArgumentError, match=r"successes must be .* got -1 at \(1, 1\)"):
            require_sound({"successes": spoil(torch.ones(2, 2, dtype=dtype), -1)})
    with pytest.raises(InvalidArgumentError, match=r"got torch\.complex64"):
        require_sound({"successes": torch.ones(2, dtype=torch.complex64)})


def test_a_belief_that_was_surprised_without_end_still_has_a_prior() -> None:
    belief = BetaPosterior(1, 1, surprise=0.1)
    for _ in range(2000):
        belief.observe(torch.tensor([0]), torch.ones(1, 1))
        belief.observe(torch.tensor([0]), torch.zeros(1, 1))
    assert belief.trust.item() > 0
    copy.deepcopy(belief).load_state_dict(belief.state_dict())
