"""The loop under torchrun: two processes, one attempt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ngd_workers.contract.rundir import AttemptDir, write_json
from tests.support import ROOT
from tests.support.attempts import records, small_spec, spooled

pytestmark = pytest.mark.ranks


@pytest.mark.slow
def test_two_processes_make_one_attempt_and_the_next_call_resumes_it(tmp_path: Path) -> None:
    spec = small_spec(optimizer={"kind": "ngd", "lr": 0.01}, resources={"workers": 2})
    write_json(tmp_path / "spec.json", spec)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    for _ in range(2):
        ended = subprocess.run(
            [*command, "-m", "ngd_workers", "spec.json", "--run-dir", "run"],
            cwd=tmp_path,
            env=_environment(),
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr

    first, second = (AttemptDir.of(tmp_path / "run", number) for number in (1, 2))
    assert [record.step for record in records(spooled(first))] == list(range(1, 9))
    assert records(spooled(second)) == []  # the first had finished
    outcome = second.read_outcome()
    assert outcome is not None
    assert (outcome.result, outcome.step) == ("succeeded", 8)


def _environment() -> dict[str, str]:
    root = str(ROOT)
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
