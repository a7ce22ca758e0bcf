"""Steps to target with NGDConfig() and each family's recipe: python bench.py mlp,cnn,vit,gpt,lstm DATA_DIR"""

import sys
from pathlib import Path

import torch

from benchmarks.families import FAMILIES
from benchmarks.methods.catalogue import DEFAULTS, recipe_of
from benchmarks.methods.run import Run, _train
from benchmarks.methods.tasks import TASKS

torch.set_num_threads(1)
for family in sys.argv[1].split(","):
    name = FAMILIES[family]
    task, data = TASKS[name], TASKS[name].load(Path(sys.argv[2]))
    for method in (DEFAULTS, recipe_of(family)):
        for seed in (1, 2, 3):
            row = _train(Run(name, method, {"steps": task.steps.high}, seed), task, data)
            print(family, method, seed, row["ending"], row["target_step"], flush=True)
