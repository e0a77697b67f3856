"""The whole of it on a small model that has learned something: who is damaged is found, and nobody else is blamed."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moe_posterior import record, swap_gates
from moe_posterior.huggingface import swapped_gates

VOCABULARY, LENGTH, E, DAMAGED = 32, 48, 8, 3


def chain(seed: int, size: int) -> Iterator[Tensor]:
    """Batches of a random Markov chain of order two."""
    table = torch.softmax(
        3 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), -1
    )
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(VOCABULARY, (size, 2), generator=generator)
        for _ in range(LENGTH - 2):
            following = torch.multinomial(table[ids[:, -2], ids[:, -1]], 1, generator=generator)
            ids = torch.cat([ids, following], dim=1)
        yield ids


def trained(steps: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=E,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _, ids in zip(range(steps), chain(seed=1, size=32), strict=False):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        optimizer.step()
    return model.eval()


def observe(model: MixtralForCausalLM, stream: Iterator[Tensor], batches: int) -> None:
    for _, ids in zip(range(batches), stream, strict=False):
        with record(model) as trace:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        trace.observe_gradients()


@pytest.mark.slow
def test_a_damaged_expert_is_found_and_its_loss_partly_regained_while_healthy_ones_stay() -> None:
    model = trained(steps=500)
    held_out, stream = next(chain(seed=2, size=128)), chain(seed=3, size=16)

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=held_out, labels=held_out).loss)

    healthy = loss()
    data = [{"input_ids": ids} for _, ids in zip(range(40), stream, strict=False)]
    swap_gates(model, num_clusters=16).fit(data).warm_start(data)
    assert loss() == healthy
    observe(model, stream, 40)
    assert loss() == pytest.approx(healthy, rel=0.002)

    down = model.model.layers[0].mlp.experts.down_proj.data
    down[DAMAGED].normal_(std=3 * float(down[DAMAGED].std()), generator=torch.Generator().manual_seed(0))
    damaged = loss()
    gate = dict(swapped_gates(model))["model.layers.0.mlp.gate"]
    kept, flag = gate.evidence_bias.clone(), gate.biased
    gate.evidence_bias[:, DAMAGED], gate.biased = -100.0, True
    masked = loss()
    gate.evidence_bias, gate.biased = kept, flag
    assert healthy < masked < damaged

    observe(model, stream, 40)  # 30,720 tokens
    bias = gate.evidence_bias.mean(dim=0)
    others = bias[torch.arange(E) != DAMAGED]
    assert float(bias[DAMAGED]) < -0.5
    assert float(others.min()) > -0.25
    assert (damaged - loss()) / (damaged - masked) > 0.5
