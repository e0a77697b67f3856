"""Tiny models and batches for the tests of the swap."""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moe_posterior.gates import PriorGate

VOCABULARY, D, E, LAYERS = 32, 16, 4, 2


def mixtral(seed: int = 0, **options: object) -> MixtralForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global seed
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=E,
            num_experts_per_tok=2,
            **options,
        )
        return MixtralForCausalLM(config).eval()


def batch(size: int = 3, length: int = 10, seed: int = 0, padded: int = 0) -> dict[str, torch.Tensor]:
    """Token ids, and an attention mask whose first sequence begins with ``padded`` tokens of padding."""
    ids = torch.randint(VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def fit_on_noise(gates: dict[str, nn.Module], seed: int = 0) -> None:
    """Clusters for tests that do not care which."""
    for gate in gates.values():
        gate.fit(torch.randn(100, gate.hidden_size, generator=torch.Generator().manual_seed(seed)))


def condemn(gate: PriorGate, expert: int) -> None:
    """Make the evidence speak against one expert in every cluster."""
    gate.posterior.failures[:, expert] = 1000.0
    gate.posterior.forget(1.0)  # keeps everything, and refreshes what depends on it


def evidence(gate: PriorGate) -> float:
    return float((gate.posterior.successes + gate.posterior.failures).sum())
