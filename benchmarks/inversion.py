"""How long does each way to an inverse take, on all factors of ResNet-50, ViT-B/16 and GPT-2 medium?

The sizes are those that the library finds in the models. Each distinct size is measured once, on a factor with
eigenvalues 1 / i^2 in a random basis, damped to a condition number of 1,000, and counted as often as it occurs. Warm
starts and SINGD's update begin with the inverse of an earlier factor, before 5% of it gave way to the mean of 4,096 new
samples. Sizes above --once-above are timed once. Sizes above --largest are left out; the table gives the share of the
work (n^3) in the others. CPUs compute 16-bit products in float32, which is no faster: there those rows show the result
of the method, not its benefit. If the ladder leaves a method for Cholesky, the time includes Cholesky's.

    python -m benchmarks.inversion --hardware cpu2
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.factors import seconds, spectrum_of, successor
from benchmarks.record import folder_for, write
from ngd_dist.capture.coverage import cover
from ngd_dist.config import CholeskyInversion, NewtonSchulzInversion, NGDConfig
from ngd_dist.factors.dense import Dense
from ngd_dist.inversion import Inverse, ToInvert, eigen, solve
from ngd_dist.inversion.direct import damped
from ngd_dist.inversion.newton_schulz import spectral_radius
from ngd_dist.preconditioners import preconditioner_for

KAPPA = 1000.0
EMA_DECAY, SAMPLES = 0.95, 4096
SINGD_RATE = 0.1  # of the normalised update: b1 / max(1, ||m||)
EIGH = "eigh"
SINGD = "SINGD's update"


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def vit_b_16() -> nn.Module:
    from torchvision.models import vit_b_16

    return vit_b_16()


def gpt2_medium() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
    "GPT-2 medium": gpt2_medium,
}


def factor_sizes(build: Callable[[], nn.Module]) -> Counter[int]:
    """Returns how often a dense factor of each size occurs in the model, blocks counted one by one."""
    with torch.device("meta"):
        model = build()
    layers, _ = cover(model, set(model.parameters()), NGDConfig())
    specs = [spec for layer in layers for spec in preconditioner_for(layer.shape, NGDConfig()).statistics]
    return sum((Counter({spec.shape[-1]: spec.shape[0]}) for spec in specs if isinstance(spec.form, Dense)), Counter())


@dataclass(frozen=True, slots=True)
class Case:
    """A factor, the inverse `old` of the factor before it, and the root K of that inverse, with K K^T = old."""

    problem: ToInvert
    matrix: Tensor
    root: Tensor


def case_of(n: int, device: str) -> Case:
    before, damping = spectrum_of(n, KAPPA, device)
    factor = successor(before, EMA_DECAY, SAMPLES)
    old = torch.linalg.inv(damped(before, damping).double())
    return Case(ToInvert(factor, damping, old.float()), damped(factor, damping), torch.linalg.cholesky(old).float())


def singd(case: Case) -> Tensor:
    """Returns K K^T after one update, K <- K (I - rate m) with m = (K^T A K + damping K^T K - I) / 2.

    That is SINGD for each factor separately, IKFAC. Source: Lin et al., arXiv 2312.05705.
    """
    K, damping = case.root, case.problem.damping.view(-1, 1, 1)
    m = (K.mT @ (case.problem.factor @ K) + damping * (K.mT @ K) - torch.eye(K.shape[-1], device=K.device)) / 2
    rate = SINGD_RATE / torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True).clamp_min(1)
    K = K - rate * (K @ m)
    return K @ K.mT


def methods(device: str) -> dict[str, Callable[[Case], Any]]:
    """Returns the timed calls by name: each is the library's, with its look at the spectrum and its checks."""
    newton = NewtonSchulzInversion(update_dtype="float32", residual="float32")
    half = NewtonSchulzInversion(update_dtype="float16", residual="split")

    def inverted(case: Case, choice: Any, *, is_warm: bool = False) -> Inverse:
        problem = case.problem if is_warm else replace(case.problem, old=None)
        inverse = solve({"": problem}, choice)[""]
        assert isinstance(inverse, Inverse)
        return inverse

    chosen: dict[str, Callable[[Case], Any]] = {
        "Cholesky float32": partial(inverted, choice=CholeskyInversion()),
        "Cholesky float64": partial(inverted, choice=CholeskyInversion(dtype="float64")),
        "Newton-Schulz float32, warm": partial(inverted, choice=newton, is_warm=True),
        "Newton-Schulz float32, cold": partial(inverted, choice=newton),
        "Newton-Schulz float16, warm": partial(inverted, choice=half, is_warm=True),
        "Newton-Schulz float16, cold": partial(inverted, choice=half),
        EIGH: lambda case: eigen(case.problem.factor),
        SINGD: singd,
    }
    return chosen


def value_of(result: Any, case: Case) -> Tensor | None:
    if isinstance(result, Inverse):
        return result.value
    if isinstance(result, Tensor):
        return result
    vectors: Tensor = result.vectors
    return vectors / (result.values + case.problem.damping.unsqueeze(-1)).unsqueeze(-2) @ vectors.mT


def residual(result: Any, case: Case) -> float:
    """Returns ||I - A X||_F / sqrt(n), not an estimate, in float64."""
    value = value_of(result, case)
    if value is None:
        return float("nan")
    n = case.matrix.shape[-1]
    rest = torch.eye(n, device=value.device) - case.matrix.double() @ value.double()
    return float(torch.linalg.vector_norm(rest) / n**0.5)


def measure(n: int, device: str, repeats: int) -> list[dict[str, Any]]:
    case = case_of(n, device)
    old = case.problem.old
    assert old is not None
    rho = float(spectral_radius(case.matrix, old).amax())
    rows = []
    for name, method in methods(device).items():
        result = method(case)
        times = seconds(partial(method, case), repeats, device)
        rows.append(
            {
                "n": n,
                "method": name,
                "rung": result.method.name if isinstance(result, Inverse) else None,
                "iterations": result.iterations if isinstance(result, Inverse) else 0,
                "median_ms": 1e3 * median(times),
                "min_ms": 1e3 * min(times),
                "max_ms": 1e3 * max(times),
                "residual": residual(result, case),
                "rho": rho,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], sizes: dict[str, Counter[int]], device: str) -> str:
    largest, names = max(row["n"] for row in rows), list(dict.fromkeys(row["method"] for row in rows))
    at = {(row["n"], row["method"]): row for row in rows}
    lines = [f"# The cost of an inverse ({device})", "", "Sum over all factors of a model, each inverted once, s:", ""]
    lines += [f"| model | dense factors | work measured | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for model, counts in sizes.items():
        measured = {n: times for n, times in counts.items() if n <= largest}
        share = sum(c * n**3 for n, c in measured.items()) / sum(c * n**3 for n, c in counts.items())
        sums = [sum(c * at[n, name]["median_ms"] for n, c in measured.items()) / 1e3 for name in names]
        of_all = f"{sum(measured.values())} of {sum(counts.values())}"
        lines.append(f"| {model} | {of_all} | {share:.0%} | {' | '.join(f'{s:.2f}' for s in sums)} |")
    lines += [
        "",
        "| n | method | rung taken | iterations | median ms | min to max | residual |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = f"{row['median_ms']:.2f} | {row['min_ms']:.2f} to {row['max_ms']:.2f} | {row['residual']:.1e}"
        lines.append(
            f"| {row['n']} | {row['method']} | {row['rung'] or '-'} | {row['iterations'] or '-'} | {figures} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--largest", type=int, default=5000)
    parser.add_argument("--once-above", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hardware", required=True, help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: run this on a machine with one")
        return
    torch.set_num_threads(1)
    sizes = {name: factor_sizes(build) for name, build in MODELS.items()}
    distinct = sorted({n for counts in sizes.values() for n in counts if n <= arguments.largest})
    rows = []
    for n in distinct:
        rows += measure(n, arguments.device, arguments.repeats if n <= arguments.once_above else 1)
        print(f"{n}: done", flush=True)
    counted = {name: dict(sorted(counts.items())) for name, counts in sizes.items()}
    text = table(rows, sizes, arguments.device)
    write(folder_for("inversion", arguments.hardware), {"sizes": counted, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
