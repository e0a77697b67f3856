"""Put a PosteriorMoE in place of the feed-forward layer of a plain transformer, and watch it route around a broken expert.

A small character model learns from English text that ships with Python. The backward pass tells the gate which expert helped which
character. Then one expert's weights are overwritten with noise, as a bad checkpoint shard would do, and the model keeps running:
no weight is trained any more, only the belief is updated, and the loss comes back down.

    python examples/drop_in_layer.py          # half a minute on one CPU core
"""

from collections import deque
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior import ExpertsFFN, PosteriorMoE, record

WIDTH, CONTEXT, BATCH, EXPERTS = 64, 64, 32, 8


class Block(nn.Module):
    """Causal attention, then a mixture of experts in place of a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = nn.MultiheadAttention(WIDTH, num_heads=4, batch_first=True)
        self.moe = PosteriorMoE(
            ExpertsFFN(EXPERTS, WIDTH, 2 * WIDTH), hidden_size=WIDTH, num_clusters=16, top_k=2, half_life=300
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, attn_mask=causal, need_weights=False)[0]
        return x + self.moe(self.norms[1](x))


class CharacterModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.block, self.head = Block(), nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return self.head(self.block(self.embed(characters) + self.position.weight))


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    text = "\n".join(topics.values())
    letters = sorted(set(text))
    place = {letter: index for index, letter in enumerate(letters)}
    data = torch.tensor([place[letter] for letter in text])

    def batch() -> Tensor:  # (B, T + 1)
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=generator)
        return data[starts + torch.arange(CONTEXT + 1)]

    def loss_of(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    model = CharacterModel(len(letters))
    moe = model.block.moe
    seen: deque[Tensor] = deque(maxlen=4)  # what the gate sees: the layer's own inputs
    moe.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))

    def fit_clusters() -> None:
        moe.gate.fit(torch.cat(list(seen)))

    moe.gate.fit(
        torch.randn(1024, WIDTH, generator=generator)
    )  # something to start with; an unfitted gate refuses to route
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        if step in (20, 100, 200):  # the hidden states have moved
            fit_clusters()
        with record(model) as trace:
            loss = loss_of(batch())
        optimizer.zero_grad()
        loss.backward()
        trace.observe_gradients()  # one bit a character and expert: did its share lower this character's loss?
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    held_out = [batch() for _ in range(8)]

    @torch.no_grad()
    def held_out_loss() -> float:
        return sum(loss_of(rows).item() for rows in held_out) / len(held_out)

    healthy = held_out_loss()
    usage = torch.bincount(moe.route(seen[-1]).expert_indices.flatten(), minlength=EXPERTS)
    victim = int(usage.argmax())
    with torch.no_grad():
        for weight in moe.experts.parameters():
            weight[victim] = 0.5 * torch.randn(weight[victim].shape, generator=generator)
    print(
        f"\nhealthy: {healthy:.3f}. Expert {victim}, the most used one, is overwritten with noise: {held_out_loss():.3f}"
    )
    for step in range(40):
        with record(model) as trace:
            loss = loss_of(batch())
        loss.backward()
        trace.observe_gradients()
        if step + 1 in (2, 5, 10, 20, 40):
            print(f"after the outcomes of {(step + 1) * BATCH * CONTEXT:6,} characters: {held_out_loss():.3f}")
    left = torch.bincount(moe.route(seen[-1]).expert_indices.flatten(), minlength=EXPERTS)[victim] / usage[victim]
    print(f"expert {victim} keeps {left:.0%} of its traffic")


if __name__ == "__main__":
    main()
