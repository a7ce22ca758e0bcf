"""DSNGD beside SGD, Adam and Newton's method on one stream of observations. Run: python examples/dually_flat.py

The loss is the conditional KL divergence from the true model. SGD's and Adam's step sizes are the best of a grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ngd_dist.config.dually_flat import StepSize
from ngd_dist.exact.dually_flat import DuallyFlatRegression

SIZES, CLASSES, BATCH = [10, 5], 10, 250
SHOWN = (1, 5, 10, 25, 50, 100, 200, 400)  # steps
X = torch.cartesian_prod(*map(torch.arange, SIZES))  # every x
A = F.pad(torch.cat([F.one_hot(c, size) for c, size in zip(X.T, SIZES, strict=True)], 1), (0, 1), value=1).double()


def newton(weight: Tensor, counts: Tensor) -> None:
    """Takes a Newton step on all observations so far, shorter far from the optimum, with a ridge of one observation."""
    p, n = (A @ weight).softmax(1), counts.sum(1, keepdim=True)
    hessian = torch.einsum("xi,xj,xkl->ikjl", A, A, n[..., None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None]))
    hessian = hessian.reshape(weight.numel(), -1) + torch.eye(weight.numel())
    gradient = A.T @ (n * p - counts) + weight
    direction = torch.linalg.solve(hessian, gradient.flatten()).view_as(weight)
    weight -= direction / (1 + ((gradient * direction).sum() / n.sum()).sqrt())


def compare(dsngd: StepSize, sgd: StepSize, adam: StepSize, seed: int = 0) -> list[list[float]]:
    """Returns the losses of the four methods at each of the steps that are shown."""
    torch.manual_seed(seed)
    truth, flat = DuallyFlatRegression(SIZES, CLASSES), DuallyFlatRegression(SIZES, CLASSES, step_size=dsngd)
    truth.alpha_S.normal_()
    truth.beta_MS.normal_()
    joint = truth.logits(X).flatten().softmax(0).view(-1, CLASSES)
    models = [nn.Linear(A.shape[1], CLASSES, bias=False).double() for _ in range(2)]
    optimizers = [torch.optim.SGD(models[0].parameters(), sgd.a), torch.optim.Adam(models[1].parameters(), adam.a)]
    decays = [LambdaLR(o, lambda t, s=s: s.at(t) / s.a) for o, s in zip(optimizers, (sgd, adam), strict=True)]
    weight, counts, losses = torch.zeros(A.shape[1], CLASSES).double(), torch.zeros_like(joint), []
    for step in range(1, SHOWN[-1] + 1):
        drawn = torch.multinomial(joint.flatten(), BATCH, replacement=True)
        counts += drawn.bincount(minlength=joint.numel()).view_as(joint)
        rows, y = drawn // CLASSES, drawn % CLASSES
        flat.step(X[rows], y)
        newton(weight, counts)
        for model, optimizer, decay in zip(models, optimizers, decays, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(A[rows]), y).backward()
            optimizer.step()
            decay.step()
        if step in SHOWN:
            logits = torch.stack([flat.logits(X), *(model(A).detach() for model in models), A @ weight])
            losses.append((joint * (truth.logits(X).log_softmax(1) - logits.log_softmax(2))).sum((1, 2)).tolist())
    return losses


if __name__ == "__main__":
    for step, row in zip(SHOWN, compare(StepSize(), StepSize(a=30, b=0.1), StepSize(a=0.6, b=0.3)), strict=True):
        print("step {} DSNGD loss {:.4f} SGD {:.4f} Adam {:.4f} Newton {:.4f}".format(step, *row))
