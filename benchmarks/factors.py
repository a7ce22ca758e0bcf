"""Synthetic Kronecker factors, and the timing of calls."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["seconds", "spectrum_of", "successor"]


def spectrum_of(n: int, kappa: float, device: str, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Returns factors [batch, n, n], float32, with eigenvalues 1 / i^2 in a random basis, and a damping [batch].

    The damping makes kappa, below n^2, the condition number of their sum.
    """
    generator = torch.Generator(device).manual_seed(n)
    basis = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, device=device)).Q
    values = torch.arange(1, n + 1, device=device, dtype=torch.float32) ** -2
    damping = torch.full((batch,), float((1 - values[-1] * kappa) / (kappa - 1)), device=device)
    return basis * values @ basis.mT, damping


def successor(factor: Tensor, weight: float, samples: int) -> Tensor:
    """Returns weight * factor + (1 - weight) * the second moment of `samples` normal rows of that covariance."""
    generator = torch.Generator(factor.device).manual_seed(samples)
    root = torch.linalg.cholesky(factor.double() + 1e-9 * torch.eye(factor.shape[-1], device=factor.device)).float()
    shape = (len(factor), samples, factor.shape[-1])
    rows = torch.randn(shape, generator=generator, device=factor.device) @ root.mT
    return weight * factor + (1 - weight) * rows.mT @ rows / samples


def seconds(work: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Returns the seconds of each call; the first call is not counted.

    On a CPU, which other processes may share, the clock is this thread's CPU time, and the process must have no other
    thread. On CUDA it is the wall's, with a drained queue.
    """
    clock = time.thread_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):
        begin = clock()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    return seconds[1:]
