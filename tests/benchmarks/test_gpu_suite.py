"""The GPU's set holds together where there is no GPU."""

import multiprocessing

import pytest
import torch

from benchmarks import gpu_suite


def test_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_suite"])

    gpu_suite.main()

    assert "no CUDA device" in capsys.readouterr().out


def test_training_on_a_group_of_one_rank_lowers_the_loss() -> None:
    # In a process of its own: wrappers of torch start threads, and no process that has them can be forked.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        first, after = (pool.apply(gpu_suite.train_on_one_rank, ("gloo", "cpu", steps)) for steps in (0, 3))

    assert after["bare"] < first["bare"]
    assert after == pytest.approx(dict.fromkeys(after, after["bare"]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "left_s", "ending"),
    [
        (["json.tool", "--help"], 60.0, "ok"),
        (["json.tool", "/nonexistent"], 60.0, "failed"),
        (["nothing_of_that_name"], 60.0, "not here"),
        (["json.tool", "--help"], 0.0, "out of time"),
        (["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 0.5, "out of time"),
    ],
)
def test_each_part_ends_in_words(arguments: list[str], left_s: float, ending: str) -> None:
    assert gpu_suite.run_part(arguments, left_s)[0] == ending


def test_table_shows_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "parts", lambda hardware: {"one": ["json.tool", "--help"], "two": ["no_such"]})

    text = gpu_suite.table(gpu_suite.run("gpu", budget_s=60))

    assert "| one | ok |" in text
    assert "| two | not here | 0 |" in text
