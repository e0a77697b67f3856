"""A transformer language model with two PosteriorMoE layers, trained on text by `moe-posterior fit`. Neither class derives from ours.

cd examples/language_model
OMP_NUM_THREADS=1 moe-posterior fit --config experiment.yaml    # characters of the help pages that come with Python; half a minute

The belief callback that `fit` adds fits each layer's clusters after `belief.warmup` batches. From then on the backward pass of every
batch says which expert lowered which character's loss.
"""

from pydoc_data.topics import topics

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from moe_posterior import ExpertsFFN, PosteriorMoE


class Windows(Dataset[Tensor]):
    """Every stretch of `context + 1` characters that starts `stride` after the one before it."""

    def __init__(self, text: Tensor, context: int, stride: int) -> None:
        self.windows = text.unfold(0, context + 1, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> Tensor:  # (context + 1,)
        return self.windows[place]


class HelpPages(lightning.LightningDataModule):
    """Python's own help pages as characters; every tenth part is for validation."""

    def __init__(self, context: int = 64, batch_size: int = 32) -> None:
        super().__init__()
        self.context, self.batch_size = context, batch_size
        pages = "\n".join(topics.values()).encode("ascii", "replace")
        text = torch.frombuffer(bytearray(pages), dtype=torch.uint8).long()
        self.train, self.val = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = Windows(self.train, self.context, stride=self.context // 2)
        return DataLoader(rows, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Windows(self.val, self.context, stride=4 * self.context), self.batch_size)


class Block(nn.Module):
    """Causal attention, then a mixture of experts in place of a feed-forward layer."""

    def __init__(self, width: int, num_experts: int, num_clusters: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        # The experts change while they learn, so what was seen of them fades: half of it every 300 observations of a cell.
        self.moe = PosteriorMoE(ExpertsFFN(num_experts, width, 2 * width), width, num_clusters, top_k=2, half_life=300)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, attn_mask=future, need_weights=False)[0]
        return x + self.moe(self.norms[1](x))


class LanguageModel(lightning.LightningModule):
    """The next character from those before it.

    Args:
        width, layers, context: of the transformer.
        num_experts, num_clusters: of each of its mixtures.
        lr: of AdamW.
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        context: int = 64,
        num_experts: int = 8,
        num_clusters: int = 16,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.embed, self.position = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, num_experts, num_clusters) for _ in range(layers)])
        self.head = nn.Linear(width, 128)

    def forward(self, characters: Tensor) -> Tensor:  # (B, T) -> (B, T, 128)
        return self.head(self.blocks(self.embed(characters) + self.position.weight))

    def loss(self, window: Tensor) -> Tensor:  # (B, T + 1) -> ()
        return functional.cross_entropy(self(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, window: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(window)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, window: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(window), prog_bar=True, batch_size=len(window))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
