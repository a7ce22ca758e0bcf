import re

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import InitFromFile
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.first_weights import load_first_weights
from tests.support.attempts import make_attempt, small_spec
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

ONE_STEP = {"schedule": {"steps": 1}, "checkpoint": {"every_steps": 1}, "optimizer": {"kind": "sgd", "lr": 1e-30}}


def model(outputs=3):
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, outputs))


def load(target, path, tmp_path, **settings):
    load_first_weights(target, InitFromFile(path=str(path), **settings), tmp_path / "runs" / "j", tmp_path)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("form", ["bare.pt", "of_a_job.pt", "lightning.ckpt", "weights.safetensors"])
def test_weights_of_a_file_become_the_model_s(tmp_path, form):
    trained, fresh = model(), model()
    state = trained.state_dict()
    if form.endswith("safetensors"):
        save_file(state, tmp_path / form)
    else:
        wrapped = {"bare.pt": state, "of_a_job.pt": {"model": state, "optimizer": {}}}
        torch.save(wrapped.get(form, {"state_dict": state, "epoch": 3}), tmp_path / form)

    load(fresh, form, tmp_path)

    assert same(fresh.state_dict(), state)


def test_head_of_another_size_is_left_alone_if_the_spec_says_so(tmp_path):
    trained, fresh = model(outputs=3), model(outputs=7)
    head = fresh[2].weight.clone()
    torch.save(trained.state_dict(), tmp_path / "w.pt")

    load(fresh, "w.pt", tmp_path, ignore=("2.*",))

    assert torch.equal(fresh[2].weight, head)
    assert torch.equal(fresh[0].weight, trained[0].weight)


def test_weight_under_two_names_may_be_saved_under_one(tmp_path):
    def tied():
        layers = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        layers["head"].weight = layers["embedding"].weight
        return layers

    trained, fresh = tied(), tied()
    save_model(trained, str(tmp_path / "w.safetensors"))  # keeps one of the two names

    load(fresh, "w.safetensors", tmp_path)

    assert torch.equal(fresh["head"].weight, trained["embedding"].weight)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = model(outputs=7).state_dict()
    state["3.weight"] = state.pop("0.weight")
    torch.save(state, tmp_path / "w.pt")

    with pytest.raises(SpecError) as caught:
        load(model(), "w.pt", tmp_path)

    message = str(caught.value)
    assert (
        "missing: 0.weight; unexpected: 3.weight; of another shape: 2.weight ([7, 5], the model has [3, 5])" in message
    )
    assert "init_from.ignore" in message


@pytest.mark.parametrize(
    ("content", "ignore", "error", "message"),
    [
        (None, (), DataNotFoundError, r"no file .*w\.pt with weights \(init_from\.path\); set NGD_DATA_DIR"),
        (b"nonsense", (), InvalidDataError, r"can't read the weights in .*w\.pt"),
        ([1, 2], (), InvalidDataError, "must hold a state dict, names and tensors, got list"),
        (model().state_dict(), ("head.*",), SpecError, r"init_from\.ignore: 'head\.\*' is no weight of the model"),
    ],
)
def test_file_that_cannot_be_used_is_refused(tmp_path, content, ignore, error, message):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pt")

    with pytest.raises(error, match=message):
        load(model(), "w.pt", tmp_path, ignore=ignore)


def test_damaged_safetensors_file_is_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x10" * 40)

    with pytest.raises(InvalidDataError, match=r"can't read the weights in .*w\.safetensors"):
        load(model(), "w.safetensors", tmp_path)


def test_job_goes_on_from_another_job_s_checkpoint(tmp_path):
    first = run_rank(make_attempt(tmp_path / "first", small_spec()))
    chosen = {"kind": "checkpoint", "run_dir": "first", "step": 6}

    newest = run_rank(make_attempt(tmp_path / "newest", small_spec(init_from=chosen | {"step": None}, **ONE_STEP)))
    run_rank(make_attempt(tmp_path / "sixth", small_spec(init_from=chosen, **ONE_STEP)))

    assert newest.metrics["accuracy"] == pytest.approx(first.metrics["accuracy"])
    assert same(weights_at(tmp_path / "newest", 1), weights_at(tmp_path / "first", 8))
    assert same(weights_at(tmp_path / "sixth", 1), weights_at(tmp_path / "first", 6))


def test_a_job_with_a_checkpoint_needs_its_first_weights_no_more(tmp_path):
    run_rank(make_attempt(tmp_path / "first", small_spec()))
    init_from = {"kind": "checkpoint", "run_dir": "first"}
    run_rank(make_attempt(tmp_path / "second", small_spec(init_from=init_from)))
    (tmp_path / "first").rename(tmp_path / "gone")

    again = run_rank(make_attempt(tmp_path / "second", small_spec(init_from=init_from), number=2))

    assert (again.result, again.step) == ("succeeded", 8)


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        (
            {"kind": "checkpoint", "run_dir": "absent"},
            r"no whole checkpoint below .*/checkpoints \(init_from.run",
        ),
        ({"kind": "checkpoint", "run_dir": "absent", "step": 3}, "no checkpoint of step 3 below"),
    ],
)
def test_checkpoint_that_is_not_there_is_named(tmp_path, init_from, message):
    outcome = run_rank(make_attempt(tmp_path / "job", small_spec(init_from=init_from)))

    assert outcome.reason == "DataNotFound"
    assert re.search(message, outcome.message), outcome.message


def first_weights(rank, world_size, attempt):
    return run_rank(attempt).model_dump(exclude={"seconds"})


@pytest.mark.ranks
def test_rank_0_reads_for_all_and_its_failure_is_everybody_s(tmp_path):
    lost = small_spec(init_from={"kind": "file", "path": "absent.pt"}, resources={"workers": 2})

    outcomes = run_ranks(2, first_weights, make_attempt(tmp_path / "lost", lost))

    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["reason"] == "DataNotFound"
