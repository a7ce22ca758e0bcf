"""From how many iterations on does Newton-Schulz cost more than Cholesky on this device?

The command writes ngd_dist/inversion/tables/<device>.json, from which `inversion: automatic` chooses. The cost of an
iteration is the slope between one and four of them; the remaining time, and the look at the spectrum before, are taken
off Cholesky's time. CPUs compute 16-bit products in float32, so that only float32 is measured there.

    python -m benchmarks.crossover --device cuda
"""

import argparse
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ngd_dist.inversion
from benchmarks.factors import seconds, spectrum_of
from ngd_dist.inversion.crossover import device_name, file_name
from ngd_dist.inversion.direct import cholesky, damped
from ngd_dist.inversion.newton_schulz import bounds, equilibrated, newton_schulz, spectral_radius

TABLES = Path(ngd_dist.inversion.__file__).parent / "tables"
ARITHMETIC = {"cpu": [("float32", "float32")], "cuda": [("float16", "split"), ("float16", "float32")]}
SIZES = {"cpu": (64, 128, 256, 512, 1024), "cuda": (64, 128, 256, 512, 1024, 2048, 4608, 8192)}
BATCHES = (1, 4, 16)
MAX_ENTRIES = {"cpu": 2**22, "cuda": 2**28}
KAPPA = 1000.0
FEW, MANY = 1, 4


def measure(n: int, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Returns one row: the arithmetic whose iterations are cheapest, the number that is worth it, and the times."""
    factor, damping = spectrum_of(n, KAPPA, device, batch)
    matrix = damped(factor, damping)
    old = cholesky(matrix)[0]

    def look() -> None:
        bounds(*equilibrated(matrix), damping)
        spectral_radius(matrix, old)

    def timed(work: Any) -> float:
        return median(seconds(work, repeats, device))

    cholesky_s, look_s = timed(lambda: cholesky(damped(factor, damping))), timed(look)
    rows = []
    for update_dtype, residual in ARITHMETIC[device]:
        dtype = getattr(torch, update_dtype)
        iterate = partial(newton_schulz, matrix, damping, old, update_dtype=dtype, residual=residual)
        few, many = timed(partial(iterate, FEW)), timed(partial(iterate, MANY))
        each_s = max(many - few, 0.01 * many) / (MANY - FEW)
        worth = (cholesky_s - look_s - (few - FEW * each_s)) / each_s
        rows.append(
            {
                "n": n,
                "batch": batch,
                "iterations": max(0, int(worth)),
                "update_dtype": update_dtype,
                "residual": residual,
                "cholesky_ms": 1e3 * cholesky_s,
                "iteration_ms": 1e3 * each_s,
                "look_ms": 1e3 * look_s,
            }
        )
    return max(rows, key=lambda row: (row["iterations"], -row["iteration_ms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: run this on a machine with one")
        return
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    rows = []
    for n in SIZES[arguments.device]:
        for batch in (b for b in BATCHES if b * n**2 <= MAX_ENTRIES[arguments.device]):
            row = measure(n, batch, arguments.device, arguments.repeats)
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(row)
            rows.append(row)
    device = device_name(torch.device(arguments.device))
    facts = {"device": device, "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    TABLES.mkdir(exist_ok=True)
    (TABLES / file_name(device)).write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
