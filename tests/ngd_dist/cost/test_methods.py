"""The planner's numbers of a layer are those of the library's own forms and methods."""

import pytest
import torch
from torch import nn

from ngd_dist.config import EKFAC, KFAC, LNGD, SENG, SINGD, TKFAC, Eva, NGDConfig, PreconditionerConfig
from ngd_dist.cost.card import LayerCard
from ngd_dist.cost.methods import layer_cost, with_gradient_rows
from ngd_dist.cost.placement import owners_of
from ngd_dist.distributed.packed_bytes import packed_nbytes
from ngd_dist.distributed.placement import place
from ngd_dist.errors import ConfigError
from ngd_dist.model_card import card_of
from ngd_dist.preconditioners import preconditioner_for

METHODS = [
    KFAC(),
    KFAC(damping_form="exact"),
    KFAC(rows=4),
    KFAC(sharing="reduce"),
    EKFAC(),
    LNGD(),
    TKFAC(),
    Eva(),
    SINGD(),
    SINGD(structure="block_diagonal", width=5),
    SINGD(structure="diagonal", momentum=0),
    SINGD(structure="low_rank", width=6),
]
METHODS += [SENG(), SENG(q=3), SENG(q=3, max_explicit=0), SENG(q=None, max_explicit=0)]
WIRES = ["float32", "bfloat16", "float16"]


class Net(nn.Module):
    """One layer of each kind that has other numbers than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.rms = nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.embedding(tokens).mT)).mT
        x = self.rms(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        output: torch.Tensor = self.wide(x)
        return output


def layers() -> tuple[LayerCard, ...]:
    return card_of(Net(), [torch.zeros(2, 5, dtype=torch.int64)]).layers


CASES = [(layer, method) for layer in layers() for method in METHODS]


@pytest.mark.parametrize(("layer", "method"), CASES, ids=lambda part: getattr(part, "name", None))
def test_a_layer_costs_what_its_method_says(layer: LayerCard, method: PreconditionerConfig) -> None:
    config = NGDConfig(preconditioner=method, max_dense=40)

    cost, real = layer_cost(layer, config), preconditioner_for(layer.shape, config)

    names, specs = ([(s.name, s.in_basis, s.is_local) for s in of] for of in (cost.statistics, real.statistics))
    assert names == specs
    assert {name: form.held for name, form in cost.cache.items()} == {
        name: torch.Size(shape).numel() for name, shape in real.cache_shapes.items()
    }
    assert cost.shared == real.shared
    assert (cost.refresh_flops, cost.apply_flops) == (real.refresh_flops(), real.apply_flops())
    for statistic, spec in zip(cost.statistics, real.statistics, strict=True):
        assert statistic.form.held == torch.Size(spec.shape).numel()
        assert statistic.form.packed == spec.form.numbers
        assert statistic.form.row_numbers == spec.form.row_numbers


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("layer", "method"), CASES, ids=lambda part: getattr(part, "name", None))
def test_a_layer_travels_in_as_many_bytes(layer: LayerCard, method: PreconditionerConfig, wire: str) -> None:
    config = NGDConfig(preconditioner=method, max_dense=40)
    dtype, kept = getattr(torch, wire), None if wire == "float32" else getattr(torch, wire)

    cost, real = layer_cost(layer, config), preconditioner_for(layer.shape, config)

    for statistic, spec in zip(cost.statistics, real.statistics, strict=True):
        assert statistic.form.on_wire(wire) == packed_nbytes(spec.form.on_wire(torch.float32, dtype).fields)
    for name, form in real.entries.items():
        assert cost.cache[name].in_cache(wire) == packed_nbytes(form.in_cache(torch.float32, kept).fields)


@pytest.mark.parametrize("kind", ["owner_sharded", "all_reduce"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
@pytest.mark.parametrize("local", [(), ("layer0", "layer7", "layer23")])
def test_layers_have_the_owners_that_the_library_gives_them(
    kind: str, fraction: float, ranks: int, local: tuple[str, ...]
) -> None:
    costs = {f"layer{i}": (i * 7919) % 23 * 1000 for i in range(40)}  # with ties
    is_sharded = kind == "owner_sharded"
    strategy = {"kind": kind} | ({"fraction": fraction, "replicate_below": 4000} if is_sharded else {})
    config = NGDConfig.model_validate({"strategy": strategy})

    owners = owners_of(costs, config, ranks, local)

    real = place(
        costs,
        ranks,
        fraction=fraction * is_sharded,
        replicate_below=4000 * is_sharded,
        everyone_inverts=not is_sharded,
        local=local,
    )
    for name, roles in real.roles.items():
        assert owners.owner[name] == roles.owner
        assert {rank for rank in range(ranks) if owners.holds(name, rank)} == set(roles.holders)
        assert {rank for rank in range(ranks) if owners.inverts(name, rank)} == set(roles.inverters)
        assert (name in owners.small) == roles.is_small


@pytest.mark.parametrize("rows", [1, 40, 150, 250, 600])
@pytest.mark.parametrize(("inputs", "outputs"), [(400, 300), (300, 400), (500, 20), (60, 40)])
def test_directions_come_from_rows_where_the_method_takes_them(inputs: int, outputs: int, rows: int) -> None:
    layer = LayerCard(name="0", inputs=inputs, outputs=outputs, positions=1)
    config = NGDConfig(ema_decay=0.5)
    real = preconditioner_for(layer.shape, config)
    cache = {name: torch.zeros(shape) for name, shape in real.cache_shapes.items()}
    dense = layer_cost(layer, config)

    cost = with_gradient_rows(dense, rows)

    are_kept = rows <= max(inputs, outputs)  # as `GradientRows.of` keeps them
    assert (cost.apply_flops < dense.apply_flops) == (are_kept and real.rows_pay(cache, rows))


def test_a_method_of_another_package_is_refused_by_name() -> None:
    class Mine(PreconditionerConfig):
        kind: str = "planned"
        method = "a:B"

    with pytest.raises(ConfigError, match="the methods of this package, got planned"):
        layer_cost(layers()[1], NGDConfig(preconditioner=Mine()))


def test_the_card_counts_positions_operations_and_weights() -> None:
    card = card_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.PReLU()), [torch.zeros(2, 3, 10, 10)], samples=7)

    assert [(layer.name, layer.positions, layer.inputs) for layer in card.layers] == [("0", 64, 28)]
    assert (card.parameters, card.other_parameters, card.samples) == (8 * 28 + 1, 1, 7)
    assert card.forward_flops == 2 * 64 * 27 * 8
    # the image, the convolution's output (read by nothing but ReLU, which keeps its own result), and that result
    assert card.activation_bytes == 4 * (300 + 8 * 64)
