"""What does one step of K-FAC cost beside one of SGD, with the ngd_dist and benchmarks of one checkout?

Blocks of ten steps alternate with blocks of SGD with momentum; process CPU time, one thread, the MLP at batch 256.

Run: OMP_NUM_THREADS=1 python bench.py CHECKOUT 1/1,10/10 BLOCKS, for two checkouts in turn. With a fourth
argument "grad" every direction is taken from the gradient.
"""

import statistics
import sys
import time

sys.path.insert(0, sys.argv[1])
import torch

from benchmarks.models import batches, model_of
from benchmarks.peers import Trainer, build

refreshes, blocks = sys.argv[2].split(","), int(sys.argv[3])
torch.set_num_threads(1)
if "grad" in sys.argv[4:]:
    import ngd_dist.preconditioners.kfac as kfac

    kfac.CHECK = 2**60
drawn = [next(stream) for stream in [batches("mlp", 256)] for _ in range(40)]


def block(trainer: Trainer) -> float:
    start = time.process_time()
    for x, y in drawn[:10]:
        trainer.run(x, y)
    return (time.process_time() - start) / 10


sgd = build("sgd", model_of("mlp"))
block(sgd)
for refresh in refreshes:
    trainer, ratios = build("ngd", model_of("mlp"), refresh), []
    for x, y in drawn if refresh == "adaptive" else drawn[:5]:
        trainer.run(x, y)
    for _ in range(blocks):
        before, spent, after = block(sgd), block(trainer), block(sgd)
        ratios.append(2 * spent / (before + after))
    print(f"{refresh} {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", flush=True)
