"""How many seconds does ResNet-50 take on Imagenette until its validation accuracy reaches a target: NGD beside SGD?

Images of 112 x 112 are held on the device as bytes, cropped to 96 and flipped there, in bfloat16 autocast. Both
optimizers have the settings of their recipes, which were not searched, and the same time: lr rises over the first 20
steps and falls to 0 over the epochs. Seconds are wall time without the evaluations.

    python -m benchmarks.imagenette --data-dir DIR --device cuda
"""

import argparse
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import model_of
from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig

__all__ = ["Images", "load", "train"]

ARCHIVE = "imagenette112.zip"
STORED, SHOWN = 112, 96  # pixels
BATCH, WARMUP = 256, 20
WEIGHT_DECAY = 5e-4
TARGET = 0.75
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "ngd": lambda model: NGD(model, NGDConfig(lr=0.03, damping=0.03, weight_decay=WEIGHT_DECAY)),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY),
}


@dataclass(frozen=True)
class Images:
    """x: [samples, 3, 112, 112], uint8; y: [samples], int64."""

    x: Tensor
    y: Tensor


def load(data_dir: Path, part: str, device: str) -> Images:
    """Returns the images of `train` or `val` in the archive, with classes numbered in the order of their names."""
    from PIL import Image

    images, folders = [], []
    with zipfile.ZipFile(data_dir / ARCHIVE) as archive:
        for name in sorted(archive.namelist()):
            *_, of_part, folder, file = ["", "", *name.split("/")]
            if of_part == part and file.endswith("JPEG"):
                picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((STORED, STORED))
                images.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
                folders.append(folder)
    classes = sorted(set(folders))
    x = torch.stack(images).view(-1, STORED, STORED, 3).permute(0, 3, 1, 2).contiguous()
    return Images(x.to(device), torch.tensor([classes.index(folder) for folder in folders], device=device))


def standardised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def batches(images: Images, seed: int, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of shuffled epochs for ever, each with one random crop, and half of its images flipped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images.y), generator=generator).split(size):
            if len(rows) < size:
                continue
            top, left = torch.randint(STORED - SHOWN + 1, (2,), generator=generator).tolist()
            is_flipped = (torch.rand(size, 1, 1, 1, generator=generator) < 0.5).to(images.x.device)
            x = images.x[rows.to(images.x.device), :, top : top + SHOWN, left : left + SHOWN]
            yield standardised(torch.where(is_flipped, x.flip(-1), x)), images.y[rows.to(images.y.device)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    model.eval()
    edge = (STORED - SHOWN) // 2
    right = 0
    for x, y in zip(images.x.split(BATCH), images.y.split(BATCH), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16):
            right += int((model(standardised(x[..., edge:-edge, edge:-edge])).argmax(1) == y).sum())
    model.train()
    return right / len(images.y)


def train(
    name: str, model: nn.Module, training: Images, test: Images, *, steps: int, every: int, most_s: float, seed: int = 0
) -> dict[str, Any]:
    """Returns the curve of one run of at most `most_s` seconds, with an evaluation each `every` steps."""
    optimizer = OPTIMIZERS[name](model)
    first_lr = [float(group["lr"]) for group in optimizer.param_groups]
    stream, spent, curve = batches(training, seed), 0.0, list[dict[str, float]]()
    for step in range(1, steps + 1):
        for group, lr in zip(optimizer.param_groups, first_lr, strict=True):
            group["lr"] = lr * min(1.0, step / WARMUP) * (1 - (step - 1) / steps)
        began = time.perf_counter()
        x, y = next(stream)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            last_loss = float(loss.detach())  # waits for the device
            spent += time.perf_counter() - began
            curve.append({"step": step, "seconds": spent, "loss": last_loss, "accuracy": accuracy(model, test)})
            if spent > most_s or last_loss != last_loss:
                break
        else:
            spent += time.perf_counter() - began
    reached = next((point for point in curve if point["accuracy"] >= TARGET), None)
    return {"optimizer": name, "seed": seed, "steps": step, "reached": reached, "curve": curve}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the result in Markdown."""
    explanation = (__doc__ or "").split("\n\n    ")[0]
    lines = ["# ResNet-50 on Imagenette", "", explanation, "", f"Target: {TARGET:.0%} of the validation images.", ""]
    lines += [
        "| optimizer | seconds to the target | steps to it | ms per step | accuracy at the end |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        last, reached = row["curve"][-1], row["reached"]
        to_target = f"{reached['seconds']:.1f} | {reached['step']}" if reached else "- | -"
        ms = 1e3 * last["seconds"] / row["steps"]
        lines.append(f"| {row['optimizer']} | {to_target} | {ms:.1f} | {last['accuracy']:.3f} after {row['steps']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help=f"the folder that holds {ARCHIVE}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--most-s", type=float, default=60.0, help="wall seconds of each optimizer")
    parser.add_argument("--hardware", default="gpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    if not (arguments.data_dir / ARCHIVE).exists():
        print(f"no {ARCHIVE} in {arguments.data_dir}: the run was left out; set NGD_DATA_DIR to the folder that has it")
        return
    training, test = (load(arguments.data_dir, part, arguments.device) for part in ("train", "val"))
    in_epoch, rows = len(training.y) // BATCH, list[dict[str, Any]]()
    for name in OPTIMIZERS:
        model = model_of("resnet50").to(arguments.device, memory_format=torch.channels_last)
        steps = arguments.epochs * in_epoch
        rows.append(train(name, model, training, test, steps=steps, every=in_epoch, most_s=arguments.most_s))
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "curve"}), flush=True)
    write(folder_for("imagenette", arguments.hardware), {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
