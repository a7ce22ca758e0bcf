"""On a cluster that may run a driver again, an attempt is run by its first driver alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ngd_workers.contract.rundir import EXIT_STATUS, NOT_THE_FIRST, AttemptDir
from tests.support.attempts import make_attempt, small_spec


def run(attempt: AttemptDir) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ngd_workers.launch", str(attempt.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_second_driver_on_a_given_cluster_leaves_the_attempt_alone(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec(), cluster="given")
    assert attempt.claim()

    second = run(attempt)

    assert second.returncode == NOT_THE_FIRST
    assert "j-a1 was begun before" in second.stderr
    assert attempt.read_outcome() is None
    assert not attempt.spool.exists()


def test_one_alone_of_many_is_the_first(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec())

    with ThreadPoolExecutor(8) as threads:
        claims = list(threads.map(lambda _: attempt.claim(), range(32)))

    assert claims.count(True) == 1


def test_attempt_json_that_is_invalid_ends_in_an_outcome(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec(), cluster="given")
    attempt.facts.write_text('{"cluster": "given"}')

    driver = run(attempt)

    outcome = attempt.read_outcome()
    assert outcome is not None
    assert (driver.returncode, outcome.result, outcome.reason) == (EXIT_STATUS["failed"], "failed", "InvalidSpec")
    assert "attempt.json is invalid" in str(outcome.message)
