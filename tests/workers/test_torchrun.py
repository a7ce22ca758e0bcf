"""The loop under torchrun: two processes, one attempt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ngd_workers.contract.rundir import AttemptDir, write_json
from ngd_workers.train.checkpoints import Checkpoints
from tests.support import ROOT
from tests.support.attempts import records, small_spec, spooled
from tests.support.deadline import wait_until

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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_a_checkpoint_and_ends_all_ranks_after_the_same_step(tmp_path: Path, processes: int) -> None:
    resources = {"min_workers": 1, "max_workers": 2}
    spec = small_spec(schedule={"steps": 1_000_000}, checkpoint={"every_steps": 1_000_000}, resources=resources)
    write_json(tmp_path / "spec.json", spec)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launcher, "-m", "ngd_workers", "spec.json", "--run-dir", "run"]
    attempt = AttemptDir.of(tmp_path / "run", 1)
    training = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: attempt.spool.exists() and records(spooled(attempt)), "training", timeout_s=120)
        training.send_signal(signal.SIGTERM)
        _, log = training.communicate(timeout=120)
    finally:
        training.kill()

    outcome = attempt.read_outcome()
    assert outcome is not None, log
    assert (outcome.result, outcome.message) == ("cancelled", "stopped by SIGTERM")
    assert Checkpoints(tmp_path / "run" / "checkpoints", attempt=1, keep=2).newest_step() == outcome.step
    assert records(spooled(attempt))[-1].step == outcome.step
    assert "Traceback" not in log or processes == 2  # torchrun's own, of the signal


@pytest.mark.slow
def test_variables_of_a_job_are_there_before_its_processes_connect(tmp_path: Path) -> None:
    spec = small_spec(resources={"workers": 2}, env={"GLOO_SOCKET_IFNAME": "nosuchlink0"})
    write_json(tmp_path / "spec.json", spec)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "ngd_workers", "spec.json", "--run-dir", "run"]

    ended = subprocess.run(
        command, cwd=tmp_path, env=_environment(), check=False, capture_output=True, text=True, timeout=120
    )

    assert ended.returncode != 0
    assert "nosuchlink0" in ended.stderr


def test_number_of_processes_that_is_no_size_of_the_job_is_refused_with_those_that_are(tmp_path: Path) -> None:
    write_json(tmp_path / "spec.json", small_spec(resources={"min_workers": 2, "max_workers": 4}))
    command = [sys.executable, "-m", "ngd_workers", "spec.json", "--run-dir", "run"]

    ended = subprocess.run(command, cwd=tmp_path, env=_environment(), check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (
        1,
        "the spec doesn't fit 1 processes: it runs with 2 or 4 workers, got 1; start as many\n",
    )


def _environment() -> dict[str, str]:
    root = str(ROOT)
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
