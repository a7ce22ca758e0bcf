"""The examples in the library's docstrings run, and what users call has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import ngd_dist
from ngd_dist import NGD, NGDConfig, ShardedState
from ngd_dist.distributed.comm import end_collectives

MODULES = ["ngd_dist", *(module.name for module in pkgutil.walk_packages(ngd_dist.__path__, "ngd_dist."))]
# Each class and function that a user calls.
CALLED = [NGD, NGDConfig, ShardedState, end_collectives]
CALLED += [value for name, value in vars(NGD).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process stands for several
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)

    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"torch": torch, "nn": nn},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )

    assert result.failed == 0


@pytest.mark.parametrize("called", CALLED, ids=lambda called: called.__qualname__)
def test_what_a_user_calls_has_an_example(called: object) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(called) or "")

    assert examples
