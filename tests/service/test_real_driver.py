"""The controller's death with nothing simulated: Ray, two workers, a real model, real events."""

from collections.abc import Callable

import pytest

from tests.service.test_crash import assert_nothing_lost_or_doubled, drivers, wait_for_step
from tests.support.attempts import small_spec
from tests.support.service_process import ServiceProcess

TRAINING_S = 200


@pytest.mark.ray
def test_training_goes_on_while_the_controller_is_dead(start_service: Callable[..., ServiceProcess]) -> None:
    spec = small_spec(
        name="digits",
        model={"kind": "small_cnn", "channels": 4, "hidden": 16},
        optimizer={"kind": "ngd"},
        schedule={"epochs": 10},
        resources={"workers": 2},
    )
    first = start_service(driver_command=None)
    job = first.client.submit(spec.model_dump(mode="json"))
    wait_for_step(first.client, job.id, 5, timeout_s=TRAINING_S)
    (driver,) = drivers(first, job.id)

    first.kill()
    assert driver.is_running()
    second = start_service(driver_command=None)
    ended = second.client.wait(job.id, timeout_s=TRAINING_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert drivers(second, job.id) == []
    assert_nothing_lost_or_doubled(second, ended)
    statistics = second.client.statistics(job.id)
    assert len(statistics.ages) == len(statistics.names) > 0
