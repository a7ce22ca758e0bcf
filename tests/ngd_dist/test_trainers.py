"""Trainers whose last accumulation window of an epoch is short: five batches, four to a step."""

import tempfile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngd_dist import NGD, NGDConfig

EPOCHS = 2
pytestmark = pytest.mark.filterwarnings("ignore")


def data() -> TensorDataset:
    torch.manual_seed(0)
    y = torch.randint(4, (80,))
    return TensorDataset(torch.randn(4, 8)[y] + 0.1 * torch.randn(80, 8), y)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


def loss_of(model: nn.Module) -> float:
    x, y = data().tensors
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = net()
    before = loss_of(model)
    optimizer = NGD(model, NGDConfig(lr=0.05, micro_batches=4))
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=16))

    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(F.cross_entropy(wrapped(x), y))
                prepared.step()
                prepared.zero_grad()

    assert optimizer.stats.step == 2 * EPOCHS
    assert loss_of(model) < before


def test_lightning() -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return NGD(self, NGDConfig(lr=0.05, micro_batches=4))

    model = Classifier()
    before = loss_of(model.net)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", accumulate_grad_batches=4, **quiet)

    trainer.fit(model, DataLoader(data(), batch_size=16))

    assert trainer.optimizers[0].stats.step == 2 * EPOCHS
    assert loss_of(model.net) < before


def test_hugging_face_trainer() -> None:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    before = loss_of(model.net)
    optimizer = NGD(model, NGDConfig(lr=0.05, micro_batches="any"))
    rows = [{"x": x, "labels": y} for x, y in data()]
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, None)).train()

    assert optimizer.stats.step == 2 * EPOCHS
    assert loss_of(model.net) < before
