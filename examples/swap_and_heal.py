"""Swap the gates of a transformers model, damage an expert, and let the belief take traffic away from it.

The model is a real Mixtral, made tiny and trained for a few hundred steps here, so that nothing is downloaded; with your own model you
only need the lines from `swap_gates` on. Swapping changes no output bit. What changes outputs is evidence: one bit for each token and
expert, read from the gradient on the routing weights. No weight of the model is trained after the swap.

    pip install 'moe-posterior[hf]'
    python examples/swap_and_heal.py          # under a minute on one CPU core
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moe_posterior import record, restore_gates, swap_gates

CONTEXT, BATCH = 64, 32


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))

    def batch() -> dict[str, Tensor]:
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        rows = data[starts + torch.arange(CONTEXT)]
        return {"input_ids": rows, "labels": rows}

    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)

    held_out = [batch() for _ in range(6)]

    @torch.no_grad()
    def held_out_loss() -> float:
        return sum(model(**rows).loss.item() for rows in held_out) / len(held_out)

    print(f"trained: {held_out_loss():.4f}")
    swapped = swap_gates(model, num_clusters=16)
    print(f"{swapped}\nswapped: {held_out_loss():.4f}")
    swapped.fit([batch() for _ in range(4)])  # find each layer's clusters
    swapped.warm_start([batch() for _ in range(12)])  # how good is each expert on each cluster while all is well?
    print(f"fitted and warm-started: {held_out_loss():.4f}")

    with record(model) as trace, torch.no_grad():
        model(**held_out[0])
    usage = torch.bincount(trace.routings[-1][1].expert_indices.flatten(), minlength=8)
    victim = int(usage.argmax())  # the most used expert of the last layer
    experts = model.model.layers[1].mlp.experts
    kept = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
    for weight in experts.parameters():
        weight[victim] += 4 * weight[victim].std() * torch.randn(weight[victim].shape, generator=generator)
    print(f"\nexpert {victim} of layer 1 damaged: {held_out_loss():.4f}")
    for step in range(10):
        rows = batch()
        with record(model) as trace:
            loss = model(**rows).loss
        loss.backward()
        trace.observe_gradients()
        if step + 1 in (1, 2, 5, 10):
            print(f"after {(step + 1) * BATCH * CONTEXT:6,} tokens: {held_out_loss():.4f}")

    restore_gates(model)  # the original routers, for comparison
    print(f"with the original routers: {held_out_loss():.4f}")
    for name, weight in experts.named_parameters():
        weight.copy_(kept[name])
    print(f"and the expert repaired: {held_out_loss():.4f}")


if __name__ == "__main__":
    main()
