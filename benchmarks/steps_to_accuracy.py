"""How many steps at batch 4,096 until Fashion-MNIST's test accuracy is 90 %: SP-NGD beside SGD and AdamW?

Each optimizer gets six settings on one seed; the one with the fewest steps is repeated on three other seeds. Model,
data, batch and workers are those of the recipe fashion-mnist. Resumable: a run whose outcome is on disk is kept. SGD
with lr 1.0 was tried first, over 140 and 210 steps, and ended at 0.81 and 0.75: warm-up and more steps took its place.

    NGD_DATA_DIR=... python -m benchmarks.steps_to_accuracy --work DIR
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import folder_for, write

RECIPE = Path(__file__).parent.parent / "workers/recipes/fashion-mnist.yaml"
EVALUATE_EVERY_STEPS = 5  # the resolution of every count below
TUNING_SEED, SEEDS = 0, (1, 2, 3)
SHORT, LONG = 140, 210  # 10 and 15 epochs: lr falls linearly to 0 over the whole length

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ngd": [
        {"lr": 0.1, "damping": 0.1, "steps": SHORT},
        {"lr": 0.05, "damping": 0.1, "steps": SHORT},
        {"lr": 0.2, "damping": 0.1, "steps": SHORT},
        {"lr": 0.05, "damping": 0.01, "steps": SHORT},
        {"lr": 0.1, "damping": 0.1, "steps": LONG},
        {"lr": 0.01, "damping": 0.001, "steps": SHORT},
    ],
    "sgd": [
        {"lr": 0.1, "steps": SHORT},
        {"lr": 0.3, "steps": SHORT},
        {"lr": 0.3, "steps": 2 * LONG, "warmup_steps": 40},
        {"lr": 0.1, "steps": LONG},
        {"lr": 0.3, "steps": LONG},
        {"lr": 0.1, "steps": 2 * LONG, "warmup_steps": 40},
    ],
    "adamw": [
        {"lr": 0.003, "steps": SHORT},
        {"lr": 0.01, "steps": SHORT},
        {"lr": 0.01, "steps": 2 * LONG, "warmup_steps": 40},
        {"lr": 0.003, "steps": LONG},
        {"lr": 0.01, "steps": LONG},
        {"lr": 0.003, "steps": 2 * LONG, "warmup_steps": 40},
    ],
}


def spec_of(optimizer: str, setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns the recipe with this optimizer; lr falls linearly for all of them, and a run ends at the target."""
    spec = yaml.safe_load(RECIPE.read_text())
    length = {key: setting[key] for key in ("steps", "warmup_steps") if key in setting}
    choice = {"kind": optimizer} | {key: value for key, value in setting.items() if key not in length}
    staleness = {"staleness": spec["optimizer"]["staleness"]} if optimizer == "ngd" else {}
    schedule = length | {"lr": {"kind": "polynomial"}, "evaluate_every_steps": EVALUATE_EVERY_STEPS}
    target = spec["target"] | {"stop": True}
    return spec | {"optimizer": choice | staleness, "schedule": schedule, "target": target, "seed": seed}


def run(name: str, spec: dict[str, Any], work: Path, data_dir: Path, port: int) -> dict[str, Any]:
    """Returns the outcome of one training run on the recipe's workers, from disk if it is there."""
    folder = work / name
    if not outcomes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        workers = str(spec["resources"]["workers"])
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", workers]
        loop = ["-m", "workers.loop", str(folder / "spec.yaml"), "--run-dir", str(folder / "run")]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                [*launcher, "--master-port", str(port), *loop, "--data-dir", str(data_dir)],
                stdout=log, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
    if not outcomes(folder):
        raise SystemExit(f"{name} left no outcome; see {folder / 'log.txt'}")
    found: dict[str, Any] = json.loads(outcomes(folder)[-1].read_text())
    return {key: found.get(key) for key in ("result", "step", "target_step", "test_accuracy", "message", "seconds")}


def outcomes(folder: Path) -> list[Path]:
    return sorted(folder.glob("run/attempts/*/outcome.json"))


def describe(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def steps_of(row: dict[str, Any]) -> float:
    return row["target_step"] or float("inf")


def measure(work: Path, data_dir: Path, parallel: int, only: list[str]) -> list[dict[str, Any]]:
    """Returns one row per run: six settings of each optimizer, then the best of each on three more seeds."""
    rows: list[dict[str, Any]] = []

    def rows_of(jobs: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
        def one(item: tuple[int, tuple[str, int, int]]) -> dict[str, Any]:
            place, (optimizer, index, seed) = item
            setting = SETTINGS[optimizer][index]
            name = f"{optimizer}-{index}-seed{seed}"
            outcome = run(name, spec_of(optimizer, setting, seed), work, data_dir, 29700 + place)
            row = {"optimizer": optimizer, "setting": describe(setting), "index": index, "seed": seed, **outcome}
            print(f"{name}: {row['setting']}: {row['target_step']} steps, {row['message'] or ''}", flush=True)
            return row

        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(one, enumerate(jobs)))

    rows += rows_of([(name, index, TUNING_SEED) for name in only for index in range(len(SETTINGS[name]))])
    best = {name: min((r for r in rows if r["optimizer"] == name), key=steps_of)["index"] for name in only}
    return rows + rows_of([(name, best[name], seed) for name in only for seed in SEEDS])


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the whole result in Markdown, losing settings included."""
    lines = ["# Steps to 90 % test accuracy, Fashion-MNIST, batch 4,096", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += [f"Counts have a resolution of {EVALUATE_EVERY_STEPS} steps.", "", "## The best setting, three seeds", ""]
    lines += ["| optimizer | setting | steps, median (all) |", "|---|---|---|"]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        repeats = [row for row in rows if row["optimizer"] == name and row["seed"] != TUNING_SEED]
        steps = [steps_of(row) for row in repeats]
        shown = ", ".join("not reached" if s == float("inf") else f"{s:g}" for s in steps)
        lines.append(f"| {name} | {repeats[0]['setting']} | {statistics.median(steps):g} ({shown}) |")
    lines += [
        "",
        "## Every setting, seed 0",
        "",
        "| optimizer | setting | steps | accuracy at the end |",
        "|---|---|---|---|",
    ]
    for row in (row for row in rows if row["seed"] == TUNING_SEED):
        accuracy = "-" if row["test_accuracy"] is None else f"{row['test_accuracy']:.4f}"
        steps = row["target_step"] or row["message"] or "not reached"
        lines.append(f"| {row['optimizer']} | {row['setting']} | {steps} | {accuracy} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds fashion-mnist/")
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept; a later call goes on from there")
    parser.add_argument("--hardware", default="cpu2", help="the last word of the result's folder")
    parser.add_argument("--parallel", type=int, default=1, help="training runs at the same time; counts don't change")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parser.parse_args()
    rows = measure(arguments.work, arguments.data_dir, arguments.parallel, arguments.only)
    write(folder_for("steps-to-accuracy", arguments.hardware), {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
