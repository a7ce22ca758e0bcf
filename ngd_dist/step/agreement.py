"""Whether a gradient is the sum of products of given rows: Freivalds' check, by products with one random vector."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.inversion.direct import probes

__all__ = ["Products", "shares_of"]

# The relative difference that counts as rounding, in units of the dtype's. Sums over 256 to 2,048 rows in another order
# differ by 2 to 12 of them; a penalty, a clipped part or another loss by far more.
ROUNDING_ERRORS = 64

# grad [B, O, I], a [B, R, I], g [B, R, O]
Products = tuple[Tensor, Tensor, Tensor]


def shares_of(products: Mapping[str, Products]) -> dict[str, float]:
    """Returns the c by which grad = c sum_r g_r a_r^T, for each layer of which that holds up to rounding.

    grad u is compared with g^T (a u), for a random vector u [I]: O(O I) operations. A gradient with another part equals
    the product for no u but those of a set of measure 0. One host read.
    """
    if not products:
        return {}
    measured = torch.stack([_compared(*of_layer) for of_layer in products.values()]).tolist()
    bounds = (ROUNDING_ERRORS * torch.finfo(grad.dtype).eps for grad, _, _ in products.values())
    return {
        name: share
        for name, (share, difference), bound in zip(products, measured, bounds, strict=True)
        if difference <= bound
    }


def _compared(grad_BOI: Tensor, a_BRI: Tensor, g_BRO: Tensor) -> Tensor:
    """Returns [2]: c and the relative difference; NaN if the gradient is 0."""
    u = probes(grad_BOI)[:, :1]
    given = (grad_BOI @ u).flatten()
    product = (g_BRO.mT @ (a_BRI @ u)).flatten()
    share = torch.dot(given, product) / torch.dot(product, product)
    rest = torch.linalg.vector_norm(torch.sub(given, share * product))
    return torch.stack([share, rest / torch.linalg.vector_norm(given)])
