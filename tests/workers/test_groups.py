"""The loop over groups of workers, on a cluster that is a list of numbers."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ngd_workers.contract.errors import ClusterError
from ngd_workers.contract.events import Event
from ngd_workers.contract.rundir import AttemptDir, Outcome
from ngd_workers.contract.spec import Job
from ngd_workers.launch import groups
from ngd_workers.launch.groups import GroupFailedError, NoRoomError, train_in_groups
from tests.support.attempts import make_attempt, small_spec, spooled
from tests.support.deadline import wait_until

JOB = small_spec(resources={"min_workers": 1, "max_workers": 4}, failure={"worker_restarts": 1})
DONE = Outcome(result="succeeded", step=9)
RESIZED = Outcome(result="resized", step=3)


class FakeRoom:
    def __init__(self, cluster: "FakeCluster", workers: int) -> None:
        self.cluster, self.workers = cluster, workers

    def is_there(self) -> bool:
        return self.cluster.room - self.cluster.used >= self.workers

    def close(self) -> None:
        self.cluster.requests.remove(self)


class FakeCluster:
    """Room for some workers, nodes that are draining, and the requests that stand."""

    changes = True

    def __init__(self, room: int) -> None:
        self.room, self.used, self.leaving = room, 0, set[str]()
        self.requests: list[FakeRoom] = []
        self.asked: list[int] = []

    def largest_size(self, job: Job, tell: Callable[[str | None], None], is_stopped: Callable[[], bool]) -> int | None:
        assert not self.requests, "the room that was asked for is given back before the next group takes it"
        if self.room < job.sizes[0]:
            tell("waiting for CPUs")
            wait_until(lambda: self.room >= job.sizes[0] or is_stopped(), "room")
            tell(None)
        self.used = max((size for size in job.sizes if size <= self.room), default=0)
        return self.used or None

    def request(self, job: Job, workers: int) -> FakeRoom:
        self.asked.append(workers)
        self.requests.append(FakeRoom(self, workers))
        return self.requests[-1]

    def draining(self, nodes: Sequence[str]) -> list[str]:
        return sorted(self.leaving.intersection(nodes))


class Script:
    """What happens to each group in turn: a function of (cluster, attempt_dir), or an error, or an outcome."""

    def __init__(self, attempt_dir: AttemptDir, cluster: FakeCluster, *acts: object) -> None:
        self.attempt_dir, self.cluster, self.acts = attempt_dir, cluster, list(acts)
        self.sizes: list[int] = []
        self.told: list[Event] = []

    def __call__(self, group: int, size: int, on_restart: Event) -> Outcome:
        self.sizes.append(size)
        self.told.append(on_restart)
        assert not self.attempt_dir.resize.exists(), "a request is of one group"
        folder = self.attempt_dir.nodes(group)
        folder.mkdir(parents=True)
        for number in range(size):
            (folder / f"node-{number}").touch()
        act = self.acts.pop(0)
        if callable(act):
            act = act()
        if isinstance(act, Exception):
            raise act
        assert isinstance(act, Outcome)
        return act


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LOOK_S", 0.01)
    monkeypatch.setattr(groups, "STEADY_S", 0.05)


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    return make_attempt(tmp_path, JOB)


def run(attempt: AttemptDir, cluster: FakeCluster, script: Script, job: Job = JOB) -> Outcome | None:
    return train_in_groups(attempt, job, cluster, script, attempt.stop.exists)


def resized(attempt: AttemptDir) -> Outcome:
    """The outcome of workers that were asked to stop, once they are."""
    wait_until(attempt.resize.exists, "the request")
    return RESIZED


def test_first_group_is_as_large_as_there_is_room_for(attempt: AttemptDir) -> None:
    for room, size in {1: 1, 2: 2, 3: 2, 4: 4, 9: 4}.items():
        cluster = FakeCluster(room)
        script = Script(AttemptDir(attempt.path / str(room)), cluster, DONE)
        assert run(attempt, cluster, script) == DONE
        assert script.sizes == [size]


def test_group_grows_to_the_next_size_once_there_is_room(attempt: AttemptDir) -> None:
    cluster = FakeCluster(1)

    def gets_room() -> Outcome:
        wait_until(lambda: cluster.asked, "a standing request")
        cluster.room = 3  # one for the next size, 2, and one that no size takes
        return resized(attempt)

    script = Script(attempt, cluster, gets_room, DONE)

    assert run(attempt, cluster, script) == DONE
    assert (script.sizes, cluster.asked[0]) == ([1, 2], 1)
    assert script.told[1].model_dump() == {
        "kind": "workers_resized", "before": 1, "after": 2, "message": "there is room for 2 workers",
    }  # fmt: skip
    assert cluster.requests == []


def test_group_of_the_largest_size_asks_for_nothing(attempt: AttemptDir) -> None:
    cluster = FakeCluster(4)
    waited = threading.Event()
    script = Script(attempt, cluster, lambda: DONE if not waited.wait(0.2) else None)

    assert run(attempt, cluster, script) == DONE
    assert cluster.asked == []


def test_group_leaves_a_node_that_is_to_be_taken_away(attempt: AttemptDir) -> None:
    cluster = FakeCluster(2)

    def drains() -> Outcome:
        cluster.leaving = {"node-1", "another-job-s"}
        outcome = resized(attempt)
        cluster.room = 1
        return outcome

    script = Script(attempt, cluster, drains, DONE)

    assert run(attempt, cluster, script) == DONE
    assert script.sizes == [2, 1]
    assert script.told[1].model_dump() == {
        "kind": "workers_resized", "before": 2, "after": 1, "message": "to be taken away: node-1",
    }  # fmt: skip


def test_node_of_another_job_may_go(attempt: AttemptDir) -> None:
    cluster = FakeCluster(4)
    cluster.leaving = {"another-job-s"}
    waited = threading.Event()
    script = Script(attempt, cluster, lambda: DONE if not waited.wait(0.2) else None)

    assert run(attempt, cluster, script) == DONE
    assert not attempt.resize.exists()


def test_crashes_alone_count(attempt: AttemptDir) -> None:
    cluster = FakeCluster(4)
    attempt_ends = [RESIZED, RESIZED, GroupFailedError("gone", is_preempted=True), NoRoomError("none"), RESIZED]
    script = Script(attempt, cluster, *attempt_ends, GroupFailedError("rank 0: killed"), DONE)

    assert run(attempt, cluster, script) == DONE
    assert [event.kind for event in script.told] == [
        "workers_restarted", "workers_resized", "workers_resized", "workers_restarted", "workers_restarted",
        "workers_resized", "workers_restarted",
    ]  # fmt: skip


def test_crash_too_many_ends_the_attempt_with_its_causes(attempt: AttemptDir) -> None:
    crashes = [GroupFailedError("rank 1: killed") for _ in range(2)]
    script = Script(attempt, FakeCluster(2), *crashes)

    with pytest.raises(ClusterError) as error:
        run(attempt, script.cluster, script)
    assert str(error.value) == "the workers failed after 1 restarts (failure.worker_restarts); rank 1: killed"


def test_crash_that_costs_a_node_goes_on_smaller_and_says_so(attempt: AttemptDir) -> None:
    cluster = FakeCluster(2)

    def loses_a_node() -> Exception:
        cluster.room = 1
        return GroupFailedError("rank 1: killed")

    script = Script(attempt, cluster, loses_a_node, DONE)

    assert run(attempt, cluster, script) == DONE
    assert script.told[1].model_dump()["message"] == (
        "the workers were started again after some of them died: 1 in place of 2"
    )


def test_room_that_is_gone_is_waited_for_and_told(attempt: AttemptDir) -> None:
    cluster = FakeCluster(1)

    def loses_all() -> Exception:
        cluster.room = 0
        threading.Timer(0.1, lambda: setattr(cluster, "room", 2)).start()
        return GroupFailedError("rank 0: killed")

    script = Script(attempt, cluster, loses_all, DONE)

    assert run(attempt, cluster, script) == DONE
    assert [event.message for event in spooled(attempt) if event.kind == "waiting"] == ["waiting for CPUs", None]


@pytest.mark.parametrize("crash", [GroupFailedError("killed"), RESIZED])
def test_attempt_that_is_stopped_starts_no_group(attempt: AttemptDir, crash: Exception | Outcome) -> None:
    def is_stopped_too() -> Exception | Outcome:
        attempt.stop.touch()
        return crash

    script = Script(attempt, FakeCluster(2), is_stopped_too)

    assert run(attempt, script.cluster, script) is None
    assert script.sizes == [2]


def test_fixed_job_leaves_a_draining_node_too_and_keeps_its_size(attempt: AttemptDir) -> None:
    cluster = FakeCluster(2)
    fixed = small_spec(resources={"workers": 2})

    def drains() -> Outcome:
        cluster.leaving = {"node-0"}
        return resized(attempt)

    def goes_on() -> Outcome:
        cluster.leaving = set()
        return DONE

    script = Script(attempt, cluster, drains, goes_on)

    assert run(attempt, cluster, script, fixed) == DONE
    assert script.sizes == [2, 2]
    assert cluster.asked == []


def test_cluster_that_does_not_answer_for_a_moment_is_asked_again(
    attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(2)
    failing = [ConnectionError("no answer"), ConnectionError("no answer")]

    def draining(nodes: Sequence[str]) -> list[str]:
        if failing:
            raise failing.pop()
        return ["node-1"]

    monkeypatch.setattr(cluster, "draining", draining)
    script = Script(attempt, cluster, lambda: resized(attempt), DONE)

    assert run(attempt, cluster, script) == DONE
    assert failing == []
