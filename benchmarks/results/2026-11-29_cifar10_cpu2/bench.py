"""Trains the CIFAR-10 recipe, narrower and shorter, with several settings of NGD and of SGD: one JSON line a run.

NGD_DATA_DIR=... python bench.py OUT.jsonl [seed]
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ngd_workers.contract.rundir import AttemptDir, Facts, write_json
from ngd_workers.contract.spec import JobSpec
from ngd_workers.contract.spec_file import parse_yaml
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.loop import Run

RECIPES = Path(__file__).parents[3] / "workers" / "ngd_workers" / "recipes"
# ResNet-18 at a quarter of its width, with the 3x3 stem: 711,000 weights.
MODEL = {
    "kind": "timm",
    "name": "resnet18",
    "stem": "cifar",
    "options": {"channels": [16, 32, 64, 128], "stem_width": 16},
}
STEPS, EVERY = 200, 50
SETTINGS: dict[str, list[dict[str, float]]] = {
    "cifar10-resnet18": [
        {"lr": 0.01, "damping": 0.01},
        {"lr": 0.03, "damping": 0.03},
        {"lr": 0.1, "damping": 0.1},
        {"lr": 0.03, "damping": 0.003},
    ],
    # The last was added since the best of the first four was the largest.
    "cifar10-resnet18-sgd": [{"lr": 0.02}, {"lr": 0.05}, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.5}],
}


def spec_of(recipe: str, settings: dict[str, float], seed: int) -> JobSpec:
    content: Any = parse_yaml((RECIPES / f"{recipe}.yaml").read_bytes())
    schedule = {key: value for key, value in content["schedule"].items() if key != "epochs"}
    return JobSpec.model_validate(
        content
        | {"model": MODEL, "seed": seed, "resources": {}, "loading": {}, "checkpoint": {"every_steps": STEPS}}
        | {"schedule": schedule | {"steps": STEPS, "evaluate_every_steps": EVERY}}
        | {"optimizer": content["optimizer"] | settings, "target": None}
    )


def run(recipe: str, settings: dict[str, float], seed: int, data_dir: Path) -> dict[str, Any]:
    """Returns the losses of training and the scores on the test data, each with the CPU seconds of training so far."""
    spent = {"train": 0.0}
    step_once = Run.step_once

    def timed(self: Run) -> None:
        start = time.process_time()
        step_once(self)
        spent["train"] += time.process_time() - start

    tests: list[dict[str, float]] = []
    evaluate = Run.evaluate

    def scored(self: Run) -> None:
        evaluate(self)
        tests.append({"step": self.progress.step, "cpu_s": round(spent["train"], 1)} | self.tested)

    Run.step_once, Run.evaluate = timed, scored  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            attempt = AttemptDir.of(Path(folder), 1)
            attempt.path.mkdir(parents=True)
            write_json(attempt.spec, spec_of(recipe, settings, seed))
            facts = Facts(
                attempt_id="a", attempt=1, job_id="j", url=None, token=None, run_dir=Path(folder), data_dir=data_dir
            )
            write_json(attempt.facts, facts)
            outcome = run_rank(attempt)
    finally:
        Run.step_once, Run.evaluate = step_once, evaluate  # type: ignore[method-assign]
    return {"recipe": recipe, **settings, "seed": seed, "tests": tests, "message": outcome.message}


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for recipe, chosen in SETTINGS.items():
        for settings in chosen:
            result = run(recipe, settings, seed, Path(os.environ["NGD_DATA_DIR"]))
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(result)


if __name__ == "__main__":
    main()
