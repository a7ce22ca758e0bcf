"""One job of each optimizer, posted over HTTP; by its real driver where a test may take a minute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngd_service.client.client import InvalidRequestError
from tests.service.test_cli import ngd, spec_file
from tests.support.attempts import small_spec
from tests.support.optimizers import DEEP, OPTIMIZERS
from tests.support.service_process import ServiceProcess

TRAINING_S = 300


def body(kind: str, **changes: Any) -> dict[str, Any]:
    return small_spec(name=kind, model=DEEP, optimizer=OPTIMIZERS[kind], **changes).model_dump(mode="json")


def test_every_optimizer_is_taken(shared_service: ServiceProcess) -> None:
    for kind in OPTIMIZERS:
        assert shared_service.client.validate(body(kind)).spec["optimizer"]["kind"] == kind


def test_parts_of_weights_are_refused_in_one_sentence(shared_service: ServiceProcess) -> None:
    job = body("soap") | {"engine": {"kind": "fsdp"}, "resources": {"workers": 2}}

    with pytest.raises(InvalidRequestError) as refusal:
        shared_service.client.submit(job)

    assert "soap rotates whole gradients, and engine fsdp leaves each worker a part of them: take engine ddp" in str(
        refusal.value
    )


def test_a_transform_is_taken_under_a_plain_optimizer(shared_service: ServiceProcess) -> None:
    job = body("sgd", transform={"kind": "sngd", "T": 5})

    assert shared_service.client.validate(job).spec["transform"]["T"] == 5
    with pytest.raises(InvalidRequestError, match="sngd makes steps natural by itself"):
        shared_service.client.submit(job | {"optimizer": {"kind": "ngd"}})


def test_optimizers_are_compared_by_name(tmp_path: Path, shared_service: ServiceProcess) -> None:
    ids = []
    for kind in ("muon", "lars"):
        file = spec_file(tmp_path, "steps", optimizer=OPTIMIZERS[kind])
        ids.append(ngd("submit", file, "--follow", url=shared_service.url).stdout.split()[0])

    lines = ngd("compare", *ids, url=shared_service.url).stdout.splitlines()

    rows = {line.split("  ")[0].strip(): line.split()[1:] for line in lines}
    assert rows["optimizer.kind"] == ["muon", "lars"]
    assert rows["optimizer.trust_coefficient"][-1] == "0.05"


@pytest.mark.slow
def test_every_optimizer_trains(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service(driver_command=None)
    jobs = {kind: service.client.submit(body(kind)) for kind in OPTIMIZERS}
    jobs["sngd"] = service.client.submit(body("sgd", transform={"kind": "sngd", "T": 5}))

    for kind, job in jobs.items():
        ended = service.client.wait(job.id, timeout_s=TRAINING_S)
        assert ended.status.phase == "SUCCEEDED", (kind, ended.status.message)
