"""The same for a data module and a model that know nothing of `moe_posterior.training`: the measurements as plain tensors.

cd examples/own_data
moe-posterior fit --config plain.yaml               # a few seconds
"""

import lightning
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from moe_posterior import MixtureOfExperts, PosteriorGate


class Measurements(lightning.LightningDataModule):
    """Measurements of 569 tumours and whether each is benign."""

    def setup(self, stage: str) -> None:
        inputs, targets = (torch.from_numpy(part) for part in load_breast_cancer(return_X_y=True))
        rows = TensorDataset(((inputs - inputs.mean(0)) / inputs.std(0)).float(), targets)
        self.train, self.val = random_split(rows, [0.7, 0.3], torch.Generator().manual_seed(1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 32)


class Diagnosis(lightning.LightningModule):
    """A backbone, four linear experts behind a gate, and a word on how each expert did."""

    def __init__(self, num_clusters: int = 4, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr, self.backbone = lr, nn.Sequential(nn.Linear(30, 32), nn.ReLU())
        experts = nn.ModuleList(nn.Linear(32, 2) for _ in range(4))
        self.moe = MixtureOfExperts(experts, PosteriorGate(32, 4, num_clusters, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        hidden = self.backbone(batch[0])
        return {"loss": functional.cross_entropy(self.moe(hidden), batch[1]), "hidden": hidden.detach()}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        right = self.moe(self.backbone(batch[0])).argmax(dim=-1) == batch[1]
        self.log("val/accuracy", right.float().mean(), prog_bar=True)

    def outcomes(self, batch: list[Tensor], outputs: dict[str, Tensor]) -> Tensor:  # (N, E): is each expert right?
        said = self.moe.expert_outputs(outputs["hidden"]).argmax(dim=-1)
        return (said == batch[1][:, None]).float()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
