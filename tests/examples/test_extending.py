"""The extensions of examples/extending: each runs, is right, and stands on docs/extending.md.

The contract's tests run on the method too, on several ranks and after a restart: tests/ngd_dist/test_preconditioners.py
and test_methods_ranks.py.
"""

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from examples.extending.layer import NamedLinear, Patches, PatchesLayer
from examples.extending.method import Diagonal, DiagonalFisher
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import PRECONDITIONERS, AdaptiveInterval, FixedInterval, PreconditionerConfig
from ngd_dist.errors import ConfigError
from ngd_dist.layers import LAYERS, Layer, Linear, register_layer
from ngd_workers.contract.spec import DataChoice, ModelChoice, TaskChoice
from ngd_workers.data import SOURCES
from ngd_workers.functions import load_function
from ngd_workers.models import MODELS
from ngd_workers.tasks import TASKS
from tests.reference.fisher import sample_gradients as reference_gradients
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched

ROOT = Path(__file__).parents[2]
EXTENSIONS = sorted((ROOT / "examples" / "extending").glob("*.py"))
PROGRAMS = [path for path in EXTENSIONS if "def main()" in path.read_text()]  # the service runs the dispatcher
F64 = torch.float64
DAMPING = 0.03


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes out again the methods and layers that a test registers."""
    methods, layers = dict(PRECONDITIONERS), dict(LAYERS)
    yield
    for registry, before in ((PRECONDITIONERS, methods), (LAYERS, layers)):
        for name in registry.keys() - before.keys():
            del registry[name]


def model_and_batch() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(16, 5, dtype=F64), torch.randint(3, (16,))


def train(model: nn.Module, optimizer: NGD, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_extension_prints_a_loss_that_falls(path: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert ended.returncode == 0, ended.stderr
    losses = [float(text) for text in re.findall(r"\bloss (\d+\.\d+)", ended.stdout)]
    assert losses[-1] < 0.3 * losses[0], ended.stdout


def test_page_shows_every_extension() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()

    assert set(re.findall(r'--8<-- "(.+)"', page)) == {str(path.relative_to(ROOT)) for path in EXTENSIONS}


# --- a method ---------------------------------------------------------------------------------------------------------


def test_method_takes_the_step_of_the_dense_formula() -> None:
    model, x, y = model_and_batch()
    config = NGDConfig(preconditioner=Diagonal(), lr=0.1, momentum=0, damping=DAMPING)
    samples = reference_gradients(model, F.cross_entropy, x, y)
    expected = [
        p.detach() - 0.1 * g.mean(0) / (g.square().mean(0) + DAMPING)
        for p, g in zip(model.parameters(), samples, strict=True)
    ]

    train(model, NGD(model, config), x, y, steps=1)

    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("staleness", [FixedInterval(), FixedInterval(steps=2), AdaptiveInterval()])
def test_method_goes_on_from_a_saved_state(staleness: FixedInterval | AdaptiveInterval) -> None:
    config = NGDConfig(preconditioner=Diagonal(), staleness=staleness, lr=0.01)
    model, x, y = model_and_batch()
    optimizer = NGD(model, config)
    train(model, optimizer, x, y, steps=4)
    twin, *_ = model_and_batch()
    resumed = NGD(twin, config)

    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(model, optimizer, x, y, steps=3)
    train(twin, resumed, x, y, steps=3)

    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert resumed.stats.intervals == optimizer.stats.intervals


def test_explanation_names_the_method_and_its_statistic() -> None:
    model, *_ = model_and_batch()

    table = NGD(model, NGDConfig(preconditioner=Diagonal())).explain()

    assert table.startswith("diagonal, empirical Fisher")
    assert "Linear, DiagonalFisher" in table
    assert "D 4x6" in table


def test_layers_of_other_blocks_keep_theirs() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))

    table = NGD(model, NGDConfig(preconditioner=Diagonal())).explain()

    assert re.findall("(Embedding|LayerNorm|Linear), (\\w+)", table) == [
        ("Embedding", "KFAC"),
        ("LayerNorm", "UnitWise"),
        ("Linear", "DiagonalFisher"),
    ]


@pytest.mark.filterwarnings("error")
def test_configuration_with_the_method_survives_pickling_and_dumping() -> None:
    config = NGDConfig(preconditioner=Diagonal(), staleness=AdaptiveInterval(thresholds={"D": 0.3}))

    assert pickle.loads(pickle.dumps(config)) == config
    assert NGDConfig.model_validate(config.model_dump()) == config
    assert NGDConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("thresholds", "used"), [({}, Diagonal.thresholds["D"]), ({"D": 0.7}, 0.7)])
def test_threshold_is_the_methods_unless_the_schedule_sets_another(thresholds: dict[str, float], used: float) -> None:
    model, x, y = model_and_batch()
    staleness = {"kind": "adaptive", "noise_margin": 0, "thresholds": thresholds}
    optimizer = NGD(model, NGDConfig.model_validate({"preconditioner": {"kind": "diagonal"}, "staleness": staleness}))

    train(model, optimizer, x, y, steps=2)

    assert {refresh.threshold for refresh in optimizer.stats.refreshes} == {used}


def test_threshold_of_no_methods_statistic_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"thresholds\.E\n +Extra inputs are not permitted"):
        NGDConfig.model_validate({"staleness": {"kind": "adaptive", "thresholds": {"E": 0.3}}})


def test_method_refuses_settings_that_contradict_it(registry: None) -> None:
    class Fussy(Diagonal):
        kind: Literal["fussy"] = "fussy"

        def refuses(self, config: NGDConfig) -> str | None:
            return "preconditioner fussy reads no clip: leave it out" if config.clip else None

    with pytest.raises(ValidationError, match="fussy reads no clip: leave it out"):
        NGDConfig.model_validate({"preconditioner": Fussy(), "clip": {"kind": "norm"}})


def test_method_without_a_class_or_a_kind_of_its_own_is_refused_at_once(registry: None) -> None:
    with pytest.raises(TypeError, match="Nameless needs a kind with a default"):

        class Nameless(PreconditionerConfig):
            method: ClassVar[str] = "package.module:Class"

    with pytest.raises(TypeError, match="Homeless needs method"):

        class Homeless(PreconditionerConfig):
            kind: Literal["homeless"] = "homeless"

    with pytest.raises(TypeError, match="Mine needs a kind of its own: kfac is that of KFAC"):

        class Mine(PreconditionerConfig):
            kind: Literal["kfac"] = "kfac"
            method: ClassVar[str] = "package.module:Class"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nowhere.at_all:Class", "can't be imported: No module named 'nowhere'"),
        ("examples.extending.method:Missing", "can't be imported: .* has no attribute 'Missing'"),
        ("examples.extending.method:Diagonal", r"must be a subclass of ngd_dist\.preconditioners\.Preconditioner"),
    ],
)
def test_class_that_is_no_method_is_named(registry: None, names: str, message: str) -> None:
    class Lost(PreconditionerConfig):
        kind: Literal["lost"] = "lost"
        method: ClassVar[str] = names

    with pytest.raises(ConfigError, match=message):
        NGD(nn.Linear(2, 2), NGDConfig(preconditioner=Lost()))


# --- a layer ----------------------------------------------------------------------------------------------------------


def test_rows_of_the_layer_give_back_each_samples_gradient() -> None:
    torch.manual_seed(0)
    module, x = Patches(3, 4).double(), torch.randn(5, 6, dtype=F64)
    (layer,) = layers_of(module)
    output, rows_of = watched([layer], lambda: module(x), len(x))
    gradient = torch.randn_like(output)

    found = sample_gradients(layer, rows_of["layer"](gradient))

    torch.testing.assert_close(found, autograd_sample_gradients(layer, output, gradient), rtol=1e-12, atol=1e-12)


def test_registered_layers_are_covered() -> None:
    model = nn.Sequential(Patches(4, 8), nn.Flatten(), NamedLinear(16, 4))

    optimizer = NGD(model, NGDConfig(preconditioner=Diagonal()))

    assert [type(layer) for layer in optimizer.layers] == [PatchesLayer, Linear]
    assert optimizer.plain_parameters == {}


class NewLinear(nn.Linear):
    pass


class Unfinished(Layer):
    def expected_input(self, x: Tensor) -> str | None:
        return None


@pytest.mark.parametrize(
    ("module_type", "kind", "message"),
    [
        (nn.Linear(2, 2), Linear, "module_type must be a subclass of torch.nn.Module, got Linear"),
        (Tensor, Linear, "module_type must be a subclass of torch.nn.Module, got <class 'torch.Tensor'>"),
        (NewLinear, DiagonalFisher, "kind must be a subclass of ngd_dist.layers.Layer, got <class"),
        (NewLinear, Unfinished, "Unfinished lacks inputs, output_gradients, shape"),
        (nn.Linear, PatchesLayer, "Linear is covered by Linear, got PatchesLayer; register a subclass of Linear"),
    ],
)
def test_registration_of_something_else_is_refused(
    registry: None, module_type: type[nn.Module], kind: type[Layer], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        register_layer(module_type, kind)


def test_registration_is_the_same_twice(registry: None) -> None:
    register_layer(NewLinear, Linear)
    register_layer(NewLinear, Linear)

    assert LAYERS[NewLinear] is Linear


@pytest.mark.parametrize(
    ("registry", "choices", "folder", "entry"),
    [
        (TASKS, TaskChoice, "tasks", "build(choice, shape)"),
        (SOURCES, DataChoice, "data", "load(choice, data_dir)"),
        (MODELS, ModelChoice, "models", "build(choice, shape)"),
    ],
    ids=["tasks", "sources", "models"],
)
def test_what_ships_is_entered_as_the_page_says(
    registry: dict[str, str], choices: object, folder: str, entry: str
) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    kinds = [choice.model_fields["kind"].default for choice in get_args(get_args(choices)[0])]

    assert f"`{entry}`" in page
    assert set(kinds) - {"function"} == set(registry) - {"function"}
    for place in registry.values():
        module, _, name = place.partition(":")
        function = load_function(place)
        assert module.startswith(f"ngd_workers.{folder}.")
        assert f"{name}({', '.join(inspect.signature(function).parameters)})" == entry


@pytest.mark.parametrize(("guide", "registry"), [("tasks.md", TASKS), ("data.md", SOURCES)], ids=["tasks", "sources"])
def test_guide_has_a_row_of_each_that_ships(guide: str, registry: dict[str, str]) -> None:
    rows = [line for line in (ROOT / "docs" / "guides" / guide).read_text().splitlines() if line.startswith("|")]

    assert [name for name in registry if f"`{name}`" not in "".join(rows)] == ["digits"][: guide == "data.md"]
