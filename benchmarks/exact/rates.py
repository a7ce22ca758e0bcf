"""The exact gradient's and K-FAC's fall of the squared residual, on inputs of several conditions."""

from typing import Any

import torch

from tests.ngd_dist.exact.two_layers import (
    TwoLayers,
    exact_residuals,
    inputs,
    kfac_residuals,
    largest_eigenvalue,
    ratios,
)

__all__ = ["rates"]

WIDTH, POINTS, DIM, STEPS, LR = 2048, 64, 10, 12, 0.5
DECADES = (0.0, 0.5, 1.0)


def rates() -> list[dict[str, Any]]:
    """Returns the ratio of |u - y|^2 after and before each step, beside the bound of each method's theorem."""
    rows = []
    for decades in DECADES:
        for name, residuals in (("exact", exact_residuals), ("K-FAC", kfac_residuals)):
            generator = torch.Generator().manual_seed(0)
            x = inputs(generator, POINTS, DIM, decades)
            model = TwoLayers(WIDTH, DIM, generator)
            eigenvalue = largest_eigenvalue(x)
            found = ratios(residuals(model, x, torch.sin(3 * x[:, 0]), LR), STEPS)
            bound = 1 - LR if name == "exact" else 1 - LR / eigenvalue
            rows.append({"method": name, "decades": decades, "eigenvalue": eigenvalue, "bound": bound, "ratios": found})
    return rows
