"""The methods of the examples beside their rivals: the examples' own problems, over several seeds."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.exact.curves import Points, curve, follow, seconds_of
from examples import dually_flat, gaussian_mixture
from examples.gaussian_process import Classifier
from ngd_dist.config.dually_flat import StepSize
from ngd_dist.exact import VariationalNGD, gpytorch_pairs
from ngd_dist.exact.dually_flat import DuallyFlatRegression

__all__ = ["categories", "classifier", "mixture", "waveform"]

GP_STEPS, GP_RATES = 400, (0.01, 0.03, 0.1)
TIMED, BLOCKS = 20, 5
ROOT = Path(__file__).parents[2]
STEP_SIZES = {"dsngd": StepSize(), "sgd": StepSize(a=30, b=0.1), "adam": StepSize(a=0.6, b=0.3)}  # docs: best of a grid


def classifier(seed: int) -> list[dict[str, Any]]:
    """Returns the negative ELBO of a Gaussian process that classifies a disc, by Adam at several rates."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(300, 2).double() - 1
    y = (x.norm(dim=1) < 0.6).double()
    return [
        curve("Gaussian process", f"{'natural + ' * is_natural}Adam {rate}", seed, _fit(x, y, is_natural, rate))
        for is_natural, rate in itertools.product((True, False), GP_RATES)
    ]


def _fit(x: Tensor, y: Tensor, is_natural: bool, rate: float) -> Points:
    model, likelihood = Classifier(x[::10].clone()).double(), gpytorch.likelihoods.BernoulliLikelihood()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    model(x)  # GPyTorch sets the variational distribution in the first call
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(model.parameters(), lr=rate)]
    if is_natural:
        natural = VariationalNGD(gpytorch_pairs(model), gamma=0.1, num_data=len(x), warmup=5)
        optimizers = [natural, torch.optim.Adam(model.hyperparameters(), lr=rate)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-bound(model(x), y)).backward()
        for optimizer in optimizers:
            optimizer.step()

    return follow(step, lambda: float(-bound(model(x), y).detach()), GP_STEPS)


def mixture(seed: int) -> list[dict[str, Any]]:
    """Returns the relative loss of each metric and of the plain gradient; of seconds there is only the whole."""
    rows = []
    for loss_of in (gaussian_mixture.squared_error, gaussian_mixture.transport):
        for name in ("plain", *gaussian_mixture.METRICS):
            losses = list[float]()
            whole = seconds_of(lambda loss_of=loss_of, name=name, to=losses: to.extend(gaussian_mixture.fit(loss_of, name, seed)), 1)  # fmt: skip  # noqa: E501
            points = [[i, whole * i / len(losses), loss] for i, loss in enumerate([1.0, *losses])]
            rows.append(curve(f"mixture, {loss_of.__name__}", name, seed, points))
    return rows


def categories(seed: int) -> list[dict[str, Any]]:
    """Returns the conditional KL divergence of four methods; their seconds are those of `_seconds` a step."""
    each, losses = _seconds(), dually_flat.compare(**STEP_SIZES, seed=seed)
    rows = list(zip(dually_flat.SHOWN, losses, strict=True))
    return [
        curve("categories", name, seed, [[step, step * seconds, row[index]] for step, row in rows])
        for index, (name, seconds) in enumerate(each.items())
    ]


def _seconds() -> dict[str, float]:
    """Returns the CPU seconds of a step of each method, the median of blocks in turn."""
    rows, y = (
        torch.randint(len(dually_flat.X), (dually_flat.BATCH,)),
        torch.randint(dually_flat.CLASSES, (dually_flat.BATCH,)),
    )
    flat, width = DuallyFlatRegression(dually_flat.SIZES, dually_flat.CLASSES), dually_flat.A.shape[1]
    weight, counts = (
        torch.zeros(width, dually_flat.CLASSES).double(),
        torch.ones(len(dually_flat.X), dually_flat.CLASSES).double(),
    )
    linear = nn.Linear(width, dually_flat.CLASSES, bias=False).double()

    def by(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(linear(dually_flat.A[rows]), y).backward()
        optimizer.step()

    sgd, adam = torch.optim.SGD(linear.parameters(), 0.1), torch.optim.Adam(linear.parameters(), 0.1)
    works = {
        "DSNGD": lambda: flat.step(dually_flat.X[rows], y),
        "SGD": lambda: by(sgd),
        "Adam": lambda: by(adam),
        "Newton": lambda: dually_flat.newton(weight, counts),
    }
    blocks = [{name: seconds_of(work, TIMED) for name, work in works.items()} for _ in range(BLOCKS)]
    return {name: sorted(block[name] for block in blocks)[BLOCKS // 2] for name in works}


def waveform(frequency: int, steps: int) -> list[dict[str, Any]]:
    """Returns the misfit of `examples/waveform.py` under each metric, and as a fourth number the medium's error."""
    command = [sys.executable, "examples/waveform.py", str(steps), str(frequency), "8"]
    printed = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=True
    ).stdout
    of_metric: dict[str, Points] = {}
    for name, step, loss, error in re.findall(
        r"^(\S+) +step (\d+) loss ([\d.]+)(?:.* ([\d.]+))?$", printed, re.MULTILINE
    ):
        of_metric.setdefault(name, []).append([int(step), 0.0, float(loss), float(error or 1)])
    return [curve(f"waveform, {frequency}", name, 0, points) for name, points in of_metric.items()]
