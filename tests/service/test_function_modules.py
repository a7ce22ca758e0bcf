"""Where the service lists modules, a job names functions of no other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ngd_service.client.client import InvalidRequestError
from ngd_service.dispatchers.base import AttemptRef, DispatchError, Launch
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.errors import InvalidSpecError, StartupError
from ngd_service.settings import load_settings
from ngd_service.validation import refuse_unlisted
from ngd_workers.contract.spec import Job, UserModel
from tests.support.attempts import small_spec
from tests.support.service_process import ServiceProcess

SHELL = {"kind": "function", "function": "os:system"}


def naming(address: str) -> dict[str, object]:
    return small_spec(data={"kind": "function", "function": address}).model_dump(mode="json")


@pytest.mark.parametrize("address", ["mine:make", "mine.data:make", "theirs.models:make"])
def test_listed_module_and_what_lies_below_it_are_taken(address: str) -> None:
    refuse_unlisted(small_spec(model={"kind": "function", "function": address}), ("mine", "theirs.models"))


@pytest.mark.parametrize("address", ["os:system", "mineral:make", "theirs:make", "theirs.data:make"])
@pytest.mark.parametrize("part", ["model", "data"])
def test_module_that_is_not_listed_is_refused(part: str, address: str) -> None:
    spec = small_spec(**{part: {"kind": "function", "function": address}})

    with pytest.raises(InvalidSpecError) as caught:
        refuse_unlisted(spec, ("mine", "theirs.models"))

    (item,) = caught.value.errors
    assert (item.pointer, item.code) == (f"/{part}/function", "function_not_listed")
    assert item.detail == f'{part}.function must be of the modules mine, theirs.models, got "{address}"'


class OwnLoop(Job):
    """A kind of job that the service need not know to find the function in it, and the one in a list."""

    train: UserModel
    parts: tuple[UserModel, ...]


def test_function_is_found_in_whichever_part_names_it() -> None:
    listed, other = UserModel(function="mine:train", options={"function": "os:system"}), UserModel(function="os:system")

    refuse_unlisted(OwnLoop(name="own", train=listed, parts=(listed,)), ("mine",))
    with pytest.raises(InvalidSpecError) as caught:
        refuse_unlisted(OwnLoop(name="own", train=other, parts=(listed, other)), ("mine",))

    assert [item.pointer for item in caught.value.errors] == ["/train/function", "/parts/1/function"]


def test_built_in_models_and_data_need_no_list() -> None:
    refuse_unlisted(small_spec(), ())


def test_service_refuses_a_function_of_another_module(start_service: Callable[..., ServiceProcess]) -> None:
    client = start_service(function_modules="mine.models, mine.data").client

    for post in (client.submit, client.validate):
        with pytest.raises(InvalidRequestError, match=r"modules mine\.models, mine\.data, got \"os:system\""):
            post(small_spec(data=SHELL).model_dump(mode="json"))
    assert client.list_jobs().jobs == []
    assert client.validate(naming("mine.data:make")).spec["data"]["function"] == "mine.data:make"


def test_job_that_is_older_than_the_list_does_not_start(tmp_path: Path) -> None:
    files = AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url="", cluster="own", function_modules=("mine",))

    with pytest.raises(DispatchError, match="must be of the modules mine"):
        files.prepare(Launch(AttemptRef("job_x", 1), naming("os:system"), "token"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["os.path:join", "a b", "a..b", "mine,1st"])
def test_name_that_is_no_module_ends_the_start(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGD_FUNCTION_MODULES", given)

    with pytest.raises(StartupError, match=r"function_modules \(NGD_FUNCTION_MODULES\) must be names of modules"):
        load_settings()
