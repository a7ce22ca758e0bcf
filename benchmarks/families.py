"""How far do settings get that nobody tuned? Steps to target with `NGDConfig()`, and with the recipe of each family.

One task per family of models. Beside them stand the steps of the tuned settings: the fewest of all trials that the
search of `benchmarks.methods` made with K-FAC's two rows on that task. Untuned settings have no schedule: lr is their
own, or chosen by the quadratic model. Medians of three seeds; if an outcome is in the folder of the search, it is not
repeated.

    python -m benchmarks.families --data-dir DIR --work DIR
"""

import argparse
import math
from pathlib import Path

import torch

from benchmarks.methods.catalogue import DEFAULTS, recipe_of
from benchmarks.methods.page import shown
from benchmarks.methods.protocol import SEEDS, Row, median_of, row_of, search
from benchmarks.methods.run import Run
from benchmarks.methods.tasks import TASKS, Data
from benchmarks.record import folder_for, write

__all__ = ["FAMILIES", "measure", "table"]

TUNED, TRIALS = ("kfac", "kfac-adaptive"), 8
FAMILIES = {"mlp": "digits-mlp", "cnn": "fashion-mnist-4096", "vit": "vit", "gpt": "gpt", "lstm": "lstm"}


def measure(family: str, data: Data, work: Path) -> list[Row]:
    """Returns one row per run: the trials of the search, then defaults and recipe on three seeds."""
    name = FAMILIES[family]
    rows = [row for method in TUNED for row in search(name, method, data, work, TRIALS)[0]]
    point = {"steps": TASKS[name].steps.high}
    for seed in SEEDS:
        for method in (DEFAULTS, recipe_of(family)):
            rows.append(row_of(Run(name, method, point, seed), "untuned", data, work))
    return [row | {"family": family} for row in rows]


def table(rows: list[Row]) -> str:
    """Returns the result in Markdown."""
    lines = ["# Settings that nobody tuned", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["| family | task | fewest steps, tuned | `NGDConfig()` | over tuned | recipe | over tuned |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in rows if row["family"] == family]
        tuned = min(row["target_step"] or math.inf for row in of_family if row["part"] == "tuned")
        cells = [family, TASKS[FAMILIES[family]].title, f"{tuned:.0f}"]
        for method in (DEFAULTS, recipe_of(family)):
            runs = [row for row in of_family if row["method"] == method]
            middle = median_of(runs, "target_step")
            ratio = f"{middle / tuned:.2f}" if math.isfinite(middle) else "-"
            cells += [shown([row["target_step"] for row in runs]), ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="the folder of the search's outcomes")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--hardware", default="cpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = list[Row]()
    for family in arguments.families:
        data = TASKS[FAMILIES[family]].load(arguments.data_dir)
        rows += measure(family, data, arguments.work)
    text = table(rows)
    write(folder_for("families", arguments.hardware), {"rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
