"""How many CPU seconds, and steps, does a target take: every method of this package beside its rivals?

See `benchmarks.methods.protocol`. If a run's outcome is on disk, it is not repeated: the command can be stopped and
goes on where it was, and two of them, with other methods, may fill one folder at the same time. The table is written
anew after each task and stage.

    python -m benchmarks.methods --data-dir DIR --work DIR
"""

import argparse
from pathlib import Path

import torch

from benchmarks.methods.catalogue import METHODS, SEARCHED
from benchmarks.methods.page import save
from benchmarks.methods.protocol import STAGES, Row, measure
from benchmarks.methods.tasks import COMPARED, TASKS
from benchmarks.record import folder_for

__all__: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the outcomes, from which a later call goes on"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(COMPARED))
    parser.add_argument("--only", nargs="+", choices=SEARCHED, default=SEARCHED, help="methods")
    parser.add_argument("--stages", nargs="+", type=int, default=list(STAGES), help="trials of each method, by stage")
    parser.add_argument("--hardware", default="cpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    methods = [name for name in arguments.only if METHODS[name].is_here()]
    data = {name: TASKS[name].load(arguments.data_dir) for name in arguments.tasks}
    folder = folder_for("methods", arguments.hardware)
    rows: dict[str, list[Row]] = {}
    for trials in arguments.stages:
        for name in arguments.tasks:
            rows[name] = measure(name, methods, data[name], arguments.work, trials)
            save(folder, [row for of_task in rows.values() for row in of_task])


if __name__ == "__main__":
    main()
