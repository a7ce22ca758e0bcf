"""NGD as the optimizer of a LightningModule. Run: python examples/lightning_module.py"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader, TensorDataset

from ngd_dist import NGD, NGDConfig

EPOCHS = 5


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0 or self.trainer.is_last_batch:
            print(f"step {self.global_step} loss {outputs['loss'].item():.4f}")

    def configure_optimizers(self) -> Any:
        optimizer = NGD(self, NGDConfig(lr=0.1, damping=0.1))
        return [optimizer], [PolynomialLR(optimizer, total_iters=EPOCHS)]


pl.seed_everything(0)
labels = torch.randint(10, (2048,))
inputs = torch.randn(10, 64)[labels] + 2 * torch.randn(2048, 64)
trainer = pl.Trainer(
    max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, labels), batch_size=256, shuffle=True))
