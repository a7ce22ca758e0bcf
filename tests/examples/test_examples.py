"""Each program in examples/ runs as its first line says, warns of nothing, and prints a loss that falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.parameters import rest_is_slow

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# What a framework warns of in a program that does nothing wrong.
FRAMEWORK_WARNINGS = {
    "gaussian_process": ["ignore:`torch.jit.script` is deprecated:FutureWarning"],  # linear_operator's
    "lightning_module": [
        "ignore:`isinstance(treespec:FutureWarning",  # an older name of torch's pytree
        "ignore:The 'train_dataloader' does not have many workers",  # said where there are more than two cores
    ],
}


def each() -> list[object]:
    """Returns all examples; those whose methods and engines have tests of their own are slow ones."""
    slow = ("gaussian_mixture", "waveform", "poisson", "fsdp2", "deepspeed_zero")
    names = [path.stem for path in EXAMPLES]
    return rest_is_slow(names, *(name for name in names if name not in slow))


@pytest.mark.parametrize("name", each())
def test_example_prints_a_loss_that_falls(name: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / f"{name}.py"
    launcher = TORCHRUN if "torchrun" in path.read_text().splitlines()[0] else ()

    ended = subprocess.run(
        [sys.executable, *launcher, str(path)],
        cwd=tmp_path,
        env=_environment(tmp_path, FRAMEWORK_WARNINGS.get(path.stem, [])),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert ended.returncode == 0, ended.stderr
    losses = [float(text) for text in re.findall(r"\bloss\W+(\d+\.\d+)", ended.stdout)]
    assert len(losses) >= 5, ended.stdout
    # From chance to well below it: the settings are not tuned, and the frameworks' own randomness moves the last loss.
    assert losses[-1] < 0.7 * losses[0], ended.stdout


def test_gallery_shows_each() -> None:
    gallery = (ROOT / "docs" / "gallery.md").read_text()

    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in gallery] == [], "run: make pictures"


def _environment(tmp_path: Path, ignored: list[str]) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": ",".join(["error", *ignored]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
