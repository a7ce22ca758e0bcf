"""One run: `bench.py RECIPE DATA_DIR ROWS.jsonl key=value ...`, run from the root of the repository with one thread.

Keys are dotted paths in the recipe, values YAML: optimizer.damping=0.3. The row holds the CPU seconds of the process,
from before it loads the data until after the last evaluation.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import yaml

from ngd_workers.contract.spec_problems import parse_spec
from ngd_workers.launch.attempt import run_rank
from tests.support.attempts import make_attempt, records, spooled


def main(recipe: str, data_dir: str, rows: str, *changes: str) -> None:
    content = yaml.safe_load(Path(recipe).read_text()) | {"resources": {"workers": 1}}
    for change in changes:
        key, _, value = change.partition("=")
        *path, last = key.split(".")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        at[last] = yaml.safe_load(value)
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.process_time()
        attempt = make_attempt(Path(folder), parse_spec(content), data_dir=Path(data_dir))
        outcome = run_rank(attempt)
        cpu_s = time.process_time() - began_s
        events = spooled(attempt)
    steps = records(events)
    row = {
        "recipe": content["name"],
        "optimizer": content["optimizer"],
        "schedule": content["schedule"],
        "batch": content["batch"],
        "seed": content.get("seed", 0),
        "steps": len(steps),
        "cpu_s": round(cpu_s, 1),
        "result": outcome.result,
        "message": outcome.message,
        "evaluations": [{"step": e.step, **e.metrics} for e in events if e.kind == "evaluation"],
        "train_loss": [round(step.metrics["loss"], 4) for step in steps[9::10]],
    }
    with Path(rows).open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
