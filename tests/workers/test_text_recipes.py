"""Each recipe of texts starts, trains a few steps, is cut off and resumes, on generated texts of the data's form."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from ngd_workers.contract.spec import JobSpec, NGDOptimizer
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.launch.attempt import run_rank
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, spooled
from tests.support.texts import sentences, write_pairs, write_text, write_token_numbers
from tests.support.training import weights_at

FOLDER = ROOT / "workers" / "ngd_workers" / "recipes"
NAMES = ["tinyshakespeare", "penn-treebank", "multi30k", "gpt2-small"]
MOST_LINES = 25
SMALL = {"width": 16, "heads": 2, "layers": 1, "encoder_layers": 1, "decoder_layers": 1}
SMALL_GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 1024, "tie_word_embeddings": False}


def write_data(folder: Path) -> None:
    """Writes what the recipes read, in small."""
    write_text(folder / "tinyshakespeare" / "input.txt", 200)
    (folder / "ptb").mkdir()
    for name, lines in (("train", 300), ("valid", 40)):
        text = "".join(f" {line} \n" for line in sentences(lines))
        (folder / "ptb" / f"ptb.{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name, lines in (("train", 60), ("test_2016_flickr", 6)):
        write_pairs(folder / "multi30k", name, lines)
    for name in ("train", "val"):
        write_token_numbers(folder / "corpus" / f"{name}.bin", 9000 if name == "train" else 1025, 500)


def reduced(spec: JobSpec) -> JobSpec:
    """Returns the recipe with a small model and batch, for six steps in one CPU worker."""
    content: dict[str, Any] = spec.model_dump(mode="json")
    model = content["model"]
    content["model"] |= {name: value for name, value in SMALL.items() if name in model}
    if "options" in model:
        model["options"] = SMALL_GPT2
        content["data"] |= {"vocabulary": 500, "length": 64}
    if content["data"].get("tokenizer", {}) and content["data"]["tokenizer"]["kind"] == "bpe":
        content["data"]["tokenizer"]["vocabulary"] = 270
    content["schedule"] |= {"steps": 6, "warmup_steps": min(2, spec.schedule.warmup_steps), "evaluate_every_steps": 6}
    content |= {"batch": {"global_size": 4}, "resources": {"workers": 1}, "checkpoint": {"every_steps": 3}}
    return JobSpec.model_validate(content)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(f"{name}-adamw", marks=pytest.mark.slow) for name in NAMES)])
def test_recipe_trains_and_goes_on_from_its_checkpoint(tmp_path, name):
    write_data(tmp_path)
    path = FOLDER / f"{name}.yaml"
    spec = reduced(load_spec(path))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    outcome = run_rank(make_attempt(whole, spec, data_dir=tmp_path))
    run_rank(make_attempt(cut, spec, data_dir=tmp_path))
    (cut / "checkpoints" / "step-00000006" / "state.pt").unlink()
    second = make_attempt(cut, spec, number=2, data_dir=tmp_path)
    resumed = run_rank(second)

    assert outcome.result == resumed.result == "succeeded", outcome.message
    assert [record.step for record in records(spooled(second))] == [4, 5, 6]
    assert next(iter(outcome.metrics)) == ("bleu" if "multi30k" in name else "perplexity")
    before, after = weights_at(whole, 6), weights_at(cut, 6, attempt=2)
    assert all(torch.equal(before[key], after[key]) for key in before)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= MOST_LINES


@pytest.mark.parametrize("name", NAMES)
def test_baseline_has_the_model_data_and_budget_of_its_recipe(name):
    ngd, adamw = (load_spec(FOLDER / f"{name}{ending}.yaml") for ending in ("", "-adamw"))

    same: dict[str, Any] = {"name": "", "optimizer": ngd.optimizer, "schedule": ngd.schedule}
    assert isinstance(ngd.optimizer, NGDOptimizer)
    assert ngd.model_copy(update=same) == adamw.model_copy(update=same)
    assert ngd.schedule.steps == adamw.schedule.steps
