"""Lightning modules and data that know nothing of this library's training, but for the mixtures inside them."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from moe_posterior import ExpertsFFN, MixtureOfExperts, PosteriorMoE, PriorGate

WIDTH, CLASSES, EXPERTS, CLUSTERS = 8, 3, 4, 5


class Layers(lightning.LightningModule):
    """A classifier with two mixtures one after the other, one decided by the belief alone, one by a learned gate."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.first = nn.Linear(2, WIDTH)
        self.alone = PosteriorMoE(ExpertsFFN(EXPERTS, WIDTH, 16), WIDTH, CLUSTERS, 2, half_life=200)
        self.learned = MixtureOfExperts(
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)), PriorGate(WIDTH, EXPERTS, CLUSTERS, 2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, points: Tensor) -> Tensor:  # (N, 2) -> (N, CLASSES)
        hidden = self.first(points).relu()
        hidden = hidden + self.alone(hidden)
        return self.head(hidden + self.learned(hidden))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        points, target = batch
        logits = self(points)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        points, target = batch
        self.log("val/loss", functional.cross_entropy(self(points), target), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Judging(Layers):
    """The same, and it says itself how the experts did: all that were chosen are credited with the right answer."""

    def outcomes(self, batch: Any, outputs: Any) -> Tensor:  # (N,)
        return (outputs["logits"].argmax(dim=-1) == batch[1]).float()


class Dense(Layers):
    """It judges every expert of its first gate on every row, whichever were chosen."""

    def outcomes(self, batch: Any, outputs: Any) -> dict[str, Tensor]:  # (N, EXPERTS)
        return {"alone.gate": (torch.arange(EXPERTS) <= batch[1][:, None]).float()}


class Clouds(lightning.LightningDataModule):
    """Three overlapping classes in the plane; plain loaders, which Lightning deals to the ranks."""

    def __init__(self, batch_size: int = 24, rows: int = 240) -> None:
        super().__init__()
        self.batch_size, self.rows = batch_size, rows

    def _loader(self, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(CLASSES, (self.rows,), generator=generator)
        points = torch.randn(self.rows, 2, generator=generator) + 1.5 * target[:, None]
        rows = TensorDataset(points, target)
        # A sampler of its own, so that one process and two see the same rows in the same batches, and a resumed run too.
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if ranks else (1, 0)
        sampler = DistributedSampler(rows, *world, seed=1)
        return DataLoader(rows, self.batch_size // world[0], sampler=sampler)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)
