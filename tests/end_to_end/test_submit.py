"""A browser on the page that submits jobs: problems, the plan, code of one's own, clones and forks, each for real."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect
from safetensors.torch import load_file

from ngd_service.client.answers import authorization
from ngd_service.client.spec_text import read
from ngd_workers.contract.spec_problems import parse_spec
from tests.support.attempts import small_spec
from tests.support.browser import DRIVES_A_BROWSER
from tests.support.deadline import wait_until
from tests.support.keys import ALICE, BOB, write_keys
from tests.support.own_code import users_folder
from tests.support.page_worker import DRAW_MS
from tests.support.service_process import ServiceProcess

pytestmark = DRIVES_A_BROWSER
TRAINING_S, PLAN_MS = 200, 200_000
JOB = """\
name: small  # mine
model: {kind: mlp, hidden: [32]}
data: {kind: digits}
optimizer: {kind: ngd, lr: 0.01, damping: 0.1}
schedule: {steps: 8}
batch: {global_size: 64}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("submit"), driver_command=None)
    yield service
    service.close()


@pytest.fixture(autouse=True)
def patience() -> None:
    expect.set_options(timeout=DRAW_MS)


def write(page: Page, text: str) -> None:
    """Replaces the text of the editor, as a paste does."""
    editor = page.get_by_label("Job file")
    expect(editor).to_be_visible()
    editor.press("Control+a")
    page.keyboard.insert_text(text)


def text_of(page: Page) -> str:
    return str(page.locator(".editor").evaluate("e => getElement(e.id.slice(1)).editor.state.doc.toString()"))


def field(page: Page, group: str, name: str) -> Locator:
    return page.get_by_role("group", name=group).get_by_label(name, exact=True)


def error_at(page: Page, group: str, name: str) -> Locator:
    own = page.get_by_label(name, exact=True)
    return page.get_by_role("group", name=group).locator(".q-field").filter(has=own).get_by_role("alert")


def test_problems_stand_at_their_fields_and_a_right_job_has_a_plan(service: ServiceProcess, page: Page) -> None:
    page.goto(f"{service.url}/submit")
    write(page, JOB)
    expect(field(page, "Optimizer", "lr")).to_have_value("0.01")

    field(page, "Optimizer", "lr").fill("-1")
    expect(error_at(page, "Optimizer", "lr")).to_contain_text("optimizer.lr must be > 0, got -1")
    problems = page.get_by_label("Problems")
    expect(problems).to_contain_text("optimizer.lr (line 4)")
    assert text_of(page) == JOB.replace("lr: 0.01", "lr: -1")
    expect(page.get_by_text("There is no plan until the job is right")).to_be_visible()

    field(page, "Optimizer", "lr").fill("0.02")
    expect(problems).to_be_hidden()
    write(page, JOB.replace("kind: ngd", "kind: ngdd").replace("8}", "eight}"))
    expect(error_at(page, "Optimizer", "optimizer")).to_contain_text("did you mean 'ngd'?")
    expect(error_at(page, "Length", "steps")).to_contain_text('must be a whole number, got "eight"')
    write(page, "name: [")
    expect(problems).to_contain_text("no YAML")

    write(page, JOB)
    expect(problems).to_be_hidden()
    page.get_by_label("optimizer", exact=True).click()
    page.get_by_role("option", name="adamw").click()
    expect(page.get_by_label("Job file")).to_contain_text("optimizer: {kind: adamw, lr: 0.01}")  # it has no damping
    plan = page.locator(".panel").filter(has=page.get_by_role("heading", name="Plan", exact=True))
    expect(plan.locator(".fact", has_text="Steps")).to_contain_text("2,410 weights", timeout=PLAN_MS)
    expect(plan.locator(".fact", has_text="Ranks")).to_contain_text("64 samples each")
    plan.get_by_text("The whole plan").click()
    expect(plan.get_by_label("The whole plan")).to_contain_text("time of a step")


@pytest.mark.slow
def test_reader_is_told_why_the_service_takes_no_job_of_theirs(page: Page, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", alice=ALICE, bob=BOB)
    service = ServiceProcess(tmp_path / "home", key=ALICE, api_keys_dir=str(keys), function_modules="theirs.models")
    job = service.client.submit(small_spec(name="steps").model_dump(mode="json"))
    page.goto(f"{service.url}/submit?clone={job.id}")
    page.get_by_label("API key").fill(BOB)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("This is the spec of steps")).to_be_visible()

    write(page, JOB + "code: {directory: .}\n")
    expect(page.get_by_label("Problems")).to_contain_text("runs functions of the modules theirs.models alone")
    (keys / "bob").unlink()
    wait_until(lambda: httpx.get(f"{service.url}/api/v1/jobs", headers=authorization(BOB)).is_error, "bob is out")
    write(page, JOB)
    page.get_by_role("button", name="Submit").click()

    expect(page.get_by_label("Problems")).to_contain_text("log in again")
    expect(page.get_by_label("Job file")).to_contain_text("name: small")
    assert [job.name for job in service.client.list_jobs().jobs] == ["steps"]
    service.close()


def test_uploaded_code_trains_once_and_its_job_is_cloned_and_forked(
    service: ServiceProcess, page: Page, tmp_path: Path
) -> None:
    folder = users_folder(tmp_path / "theirs")
    archive = tmp_path / "theirs.zip"
    with zipfile.ZipFile(archive, "w") as files:
        for path in folder.rglob("*"):
            files.write(path, path.relative_to(tmp_path))
    page.goto(f"{service.url}/submit")
    write(page, (folder / "job.yaml").read_text())
    expect(page.get_by_text("The job names a folder: choose its files")).to_be_visible()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_label("Problems")).to_contain_text("code.sha256 is missing: the folder was not shipped")

    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose files").click()
    chooser.value.set_files(archive)
    expect(page.get_by_text("Code shipped: 9 files")).to_be_visible()
    expect(page.get_by_label("Problems")).to_be_hidden()
    page.get_by_role("button", name="Submit").dblclick()
    page.wait_for_url(re.compile("/jobs/job_"))
    (job,) = service.client.list_jobs().jobs
    ended = service.client.wait(job.id, timeout_s=TRAINING_S)
    assert (ended.status.phase, ended.status.progress.step) == ("SUCCEEDED", 6), service.client.logs(job.id)

    page.get_by_role("link", name="Clone").click()
    expect(page.get_by_text("without its defaults")).to_be_visible()
    clone = text_of(page)
    assert parse_spec(read(clone)) == parse_spec(job.spec)
    assert "seed" not in clone

    page.goto(f"{service.url}/jobs/{job.id}")
    newest = page.get_by_role("row").filter(has_text="newest")
    newest.get_by_role("button", name="Pin").click()
    expect(newest).to_contain_text("pinned")
    assert [one.step for one in service.client.checkpoints(job.id) if one.is_pinned] == [6]
    with page.expect_download() as weights:
        newest.get_by_role("link", name="Weights").click()
    assert load_file(weights.value.path())["0.weight"].shape == (8, 4)
    with page.expect_download() as card:
        newest.get_by_role("button", name="Card").click()
    assert json.loads(card.value.path().read_text())["code_sha256"] == job.spec["code"]["sha256"]
    newest.get_by_role("link", name="Fork").click()
    expect(page.get_by_text("The last step must come after 6")).to_be_visible()
    expect(field(page, "Model", "step")).to_have_value("6")
    field(page, "Length", "steps").fill("9")
    expect(page.get_by_label("Job file")).to_contain_text("steps: 9")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile("/jobs/job_"))
    fork = service.client.wait(page.url.rpartition("/")[2], timeout_s=TRAINING_S)
    assert (fork.status.phase, fork.status.progress.step) == ("SUCCEEDED", 9), service.client.logs(fork.id)
    assert fork.spec["init_from"] == {
        "kind": "checkpoint", "run_dir": job.id, "step": 6, "takes": "everything", "ignore": []
    }  # fmt: skip
