"""The examples in the library's docstrings run, and what users call has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import ngd_dist
from ngd_dist import NGD, NGDConfig, Preconditioner, ShardedState
from ngd_dist.config.deepspeed import check_deepspeed
from ngd_dist.distributed.comm import end_collectives
from ngd_dist.engines import Inner
from ngd_dist.natural_gradient import NaturalGradient

MODULES = ["ngd_dist", *(module.name for module in pkgutil.walk_packages(ngd_dist.__path__, "ngd_dist."))]
# Each class and function that a user calls.
CALLED = [NGD, NGDConfig, Preconditioner, ShardedState, Inner, check_deepspeed, end_collectives]
CALLED += [
    value
    for kind in (NGD, NaturalGradient, Preconditioner)
    for name, value in vars(kind).items()
    if inspect.isfunction(value) and not name.startswith("_")
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process stands for several
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)

    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"torch": torch, "nn": nn, "NGD": NGD, "NGDConfig": NGDConfig},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )

    assert result.failed == 0


@pytest.mark.parametrize("called", CALLED, ids=lambda called: called.__qualname__)
def test_what_a_user_calls_has_an_example(called: object) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(called) or "")

    assert examples
