"""Writes what `ngd plan` counts from, with torch: ``python -m ngd_workers.launch.model_card SPEC``, on stdout as JSON.

The card of the job's model; with --measure, a short run of the job on this device, which has the card too.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.cost.card import ModelCard
from ngd_dist.model_card import card_of
from ngd_workers.contract.checkpoint_files import TensorForm
from ngd_workers.contract.errors import SpecError, UserCodeError, WorkerError
from ngd_workers.contract.spec import JobSpec, Loading, NGDOptimizer
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.data import Dataset, Images, TokenSequences, Vectors, load_dataset
from ngd_workers.launch.measuring import measured
from ngd_workers.launch.own_code import variables
from ngd_workers.models import build_model
from ngd_workers.tasks import build_task
from ngd_workers.train.learner import check_fit
from ngd_workers.train.loading import Samples, placed, read_ahead, requests_to_test

__all__ = ["card_of_job", "card_without_data", "main", "shape_of"]

SAMPLES = 2  # of the pass that is counted: batch norm takes no single one

Shape = Images | Vectors | TokenSequences
FORMS = "images:3x224x224:1000 (channels x height x width : classes), vectors:784:10 or tokens:50257x1024"


def main() -> None:
    """Prints a card, or a measured run; a foreseeable failure is one sentence and status 1."""
    parser = argparse.ArgumentParser(prog="python -m ngd_workers.launch.model_card", description="Describe a model.")
    parser.add_argument("spec", type=Path, help="the job in YAML or JSON")
    parser.add_argument("--data-dir", type=Path, default=Path(), help="folder in which a relative data.directory lies")
    parser.add_argument("--shape", help=f"of the data, which are then not read: {FORMS}")
    parser.add_argument("--samples", type=int, help="in an epoch, if the data are not read")
    parser.add_argument("--measure", action="store_true", help="train for some seconds, and print the times")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # stdout is the result; a warning would be repeated by the run itself
    try:
        spec = load_spec(arguments.spec)
        if not isinstance(spec, JobSpec):
            raise SpecError("a job with a loop of its own (train) names no model; the planner can't count its steps")
        data_dir = arguments.data_dir.resolve()
        with _in_its_folder(spec, arguments.spec.parent):
            if arguments.shape is not None:
                card = card_without_data(spec, shape_of(arguments.shape), arguments.samples)
            else:
                card = card_of_job(spec, load_dataset(spec.data, data_dir))
            answer = measured(spec, card, data_dir) if arguments.measure else card
        sys.stdout.write(answer.model_dump_json() + "\n")
    except WorkerError as error:
        sys.exit(str(error))


@contextlib.contextmanager
def _in_its_folder(spec: JobSpec, place: Path) -> Iterator[None]:
    """The process sees the job's variables and code as its workers would, but for its secrets and requirements."""
    with variables(spec.env):
        if spec.code is None:
            yield
            return
        folder = (place / spec.code.directory).resolve()
        sys.path.append(str(folder))
        with contextlib.chdir(folder):
            yield


def card_of_job(spec: JobSpec, dataset: Dataset) -> ModelCard:
    """Returns the card of the job's model on its data. Raises: WorkerError."""
    task = build_task(spec.task, dataset.shape)
    model = build_model(spec.model, dataset.shape)
    trial = list(requests_to_test(min(SAMPLES, len(dataset.test)), SAMPLES, rank=0, world_size=1))
    forms: list[TensorForm] | None = None
    for batch in read_ahead(Samples(dataset.test, dataset, spec.seed), trial, Loading(), pins=False):
        forms = check_fit(model, task, placed(batch.content, dataset, torch.device("cpu")))
    if forms is None:
        raise SpecError("the model is called with more than tensors, which the planner can't stand in for; give --card")
    inputs = [torch.zeros(SAMPLES, *form.shape[1:], dtype=getattr(torch, form.dtype)) for form in forms]
    return _card(model, inputs, spec, len(dataset.train))


def shape_of(text: str) -> Shape:
    """Returns the shape of data in its short form. Raises: SpecError.

    >>> shape_of("images:3x224x224:1000")
    Images(channels=3, height=224, width=224, classes=1000)
    """
    kind, _, sizes = text.partition(":")
    numbers = sizes.replace(":", "x").split("x")
    made, count = SHAPES.get(kind, (None, 0))
    if made is None or len(numbers) != count or not all(size.isdecimal() and int(size) for size in numbers):
        raise SpecError(f"--shape must be one of {FORMS}, got {text[:80]!r}")
    return made(*map(int, numbers))


SHAPES: dict[str, tuple[Callable[..., Shape], int]] = {
    "images": (Images, 4),
    "vectors": (Vectors, 2),
    "tokens": (TokenSequences, 2),
}


def card_without_data(spec: JobSpec, shape: Shape, samples: int | None) -> ModelCard:
    """Returns the card of the job's model for data of this shape. Raises: WorkerError."""
    match shape:
        case Images():
            x = torch.zeros(SAMPLES, shape.channels, shape.height, shape.width)
        case Vectors():
            x = torch.zeros(SAMPLES, shape.width)
        case TokenSequences():
            x = torch.zeros(SAMPLES, shape.length, dtype=torch.int64)
    with torch.device("meta"):  # a large model would take minutes to fill with numbers
        model = build_model(spec.model, shape)
    return _card(model, [x], spec, samples)


def _card(model: torch.nn.Module, inputs: list[Tensor], spec: JobSpec, samples: int | None) -> ModelCard:
    config = spec.optimizer if isinstance(spec.optimizer, NGDOptimizer) else NGDConfig()
    try:
        return card_of(model, inputs, config, samples=samples)
    except (RuntimeError, NotImplementedError) as error:
        raise UserCodeError(
            f"the model can't be counted without its numbers: {type(error).__name__}: {str(error)[:200]}; give --card"
        ) from error


if __name__ == "__main__":
    main()
