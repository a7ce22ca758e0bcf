"""What every form of a factor promises, and that a form of one's own, written here, needs no other line of ours."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from examples.extending.form import BLOCK, BlockDiagonal, InBlocks
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.config import FixedInterval
from ngd_dist.distributed.packed_bytes import pack_bytes, unpack_bytes
from ngd_dist.factors.blocks import BlockStructure
from ngd_dist.factors.codec import Codec
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.form import FactorForm, InputRows, Replicate
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.factors.low_rank import LowRankStructure
from ngd_dist.factors.root import Root
from ngd_dist.factors.storage import Stored
from ngd_dist.factors.structure import DiagonalStructure
from ngd_dist.inversion import Inverse, solve
from ngd_dist.preconditioners.kfac import KFAC
from tests.support.ranks import run_ranks
from tests.support.rows import random_rows
from tests.support.training import train

F64 = torch.float64
B, N, P, WIDTH = 2, 2, 2, 6


FORMS: dict[str, FactorForm] = {
    "dense": Dense((B, WIDTH, WIDTH)),
    "diagonal": Diagonal((B, WIDTH)),
    "root": Root((B, N * P, WIDTH)),
    "block-diagonal": BlockDiagonal((B, WIDTH // BLOCK, BLOCK, BLOCK)),
}
# They have a root in place of an inverse.
STRUCTURES: dict[str, FactorForm] = {
    "diagonal structure": DiagonalStructure((B, WIDTH)),
    "block structure": BlockStructure.of(B, WIDTH, 4),
    "low rank": LowRankStructure((B, 3, WIDTH)),
}
# The entries of a matrix that a form keeps.
KEPT = {
    "dense": torch.ones(WIDTH, WIDTH),
    "diagonal": torch.eye(WIDTH),
    "root": torch.ones(WIDTH, WIDTH),
    "block-diagonal": torch.block_diag(*[torch.ones(BLOCK, BLOCK)] * (WIDTH // BLOCK)),
    "diagonal structure": torch.eye(WIDTH),
    "block structure": torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)),
    "low rank": torch.eye(WIDTH).index_fill(0, torch.arange(2), 1).index_fill(1, torch.arange(2), 1),
}
every_form = pytest.mark.parametrize("name", FORMS)
every_moment = pytest.mark.parametrize("name", FORMS | STRUCTURES)


def value_of(name: str, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    rows = random_rows((B, 1, WIDTH), samples=N, positions=P, seed=seed)
    return (FORMS | STRUCTURES)[name].moment(rows.a_BNPI, 1 / N, Replicate()).to(dtype)


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(5))


@every_moment
def test_a_moment_is_that_of_the_rows_where_the_form_keeps_it(name: str) -> None:
    form, rows = (FORMS | STRUCTURES)[name], random_rows((B, 1, WIDTH), samples=N, positions=P)
    scale = torch.tensor([0.5, 3.0], dtype=F64)

    value = form.moment(rows.a_BNPI, scale, Replicate())

    assert value.shape == form.shape
    torch.testing.assert_close(form.dense(value), second_moment(rows.a_BNPI, scale) * KEPT[name])
    given: InputRows = rows
    torch.testing.assert_close(form.input_moment(given), form.moment(rows.a_BNPI, 1 / N, Replicate()))


@every_moment
def test_the_mean_over_replicates_is_that_of_the_whole_batch(name: str) -> None:
    form, rows = (FORMS | STRUCTURES)[name], random_rows((B, 1, WIDTH), samples=N, positions=P).a_BNPI
    halves = [form.moment(half, 2 / N, Replicate(i, 2)) for i, half in enumerate(rows.chunk(2, dim=1))]

    mean = form.mean(halves[0] + halves[1], 2, 2, 1)

    torch.testing.assert_close(form.dense(mean), second_moment(rows, 1 / N) * KEPT[name])
    for half, its_rows in zip(halves, rows.chunk(2, dim=1), strict=True):
        own = second_moment(its_rows, 2 / N) * KEPT[name]
        torch.testing.assert_close(form.norm(half, 2), torch.linalg.vector_norm(own))


@every_moment
def test_norm_distance_and_mean_eigenvalue_are_those_of_the_matrix(name: str) -> None:
    form, x, y = (FORMS | STRUCTURES)[name], value_of(name), value_of(name, seed=1)
    X, Y = form.dense(x), form.dense(y)

    torch.testing.assert_close(form.norm(x), torch.linalg.vector_norm(X))
    torch.testing.assert_close(form.distance(x, y), torch.linalg.vector_norm(X - Y))
    torch.testing.assert_close(form.mean_eigenvalue(x), X.diagonal(dim1=-2, dim2=-1).mean(-1))


@every_form
def test_products_with_the_inverse_are_those_of_the_damped_matrix(name: str) -> None:
    form, value, damping = FORMS[name], value_of(name), torch.tensor([0.1, 0.3], dtype=F64)
    damped = form.dense(value) + damping.view(-1, 1, 1) * torch.eye(WIDTH, dtype=F64)

    found = solve({name: form.problem(value, damping, None)})[name]

    assert isinstance(found, Inverse)
    assert found.value is not None
    assert found.value.shape == form.inverse.shape
    left, right, scale = matrix(B, WIDTH, 3), matrix(B, 3, WIDTH), damping.view(-1, 1, 1) if form.lacks_damping else 1
    torch.testing.assert_close(form.left(found.value, left) / scale, torch.linalg.solve(damped, left))
    torch.testing.assert_close(form.right(right, found.value) / scale, torch.linalg.solve(damped, right.mT).mT)
    error = form.error(value, damping, found.value)
    assert error is None or float(error) < 1e-12


@every_form
def test_eigenvalues_and_vectors_make_the_matrix(name: str) -> None:
    form, value = FORMS[name], value_of(name)
    problem = form.to_decompose(value)

    found = form.eigen(value, None if problem is None else solve({name: problem})[name])

    assert found.values is not None
    basis = torch.eye(WIDTH, dtype=F64).expand(B, -1, -1) if found.vectors is None else found.vectors
    assert form.basis == (None if found.vectors is None else tuple(found.vectors.shape))
    torch.testing.assert_close(basis @ torch.diag_embed(found.values) @ basis.mT, form.dense(value))


def crossed(codec: Codec, value: Tensor) -> Tensor:
    tensors = pack_bytes(codec.fields, codec.encode(value), value.device)
    return codec.decode(unpack_bytes(codec.fields, tensors))


@every_moment
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_statistic_arrives_as_it_was_or_rounded(name: str, dtype: torch.dtype) -> None:
    form, value = (FORMS | STRUCTURES)[name], value_of(name, dtype=torch.float32)
    flat = form.flatten(value)

    arrived = crossed(form.on_wire(torch.float32, dtype), flat)

    assert flat.shape == (form.numbers,)
    assert torch.equal(form.expand(flat), value)
    assert arrived.dtype == torch.float32
    assert float(form.distance(form.expand(arrived), value)) <= torch.finfo(dtype).eps * float(form.norm(value)) * 2


@every_form
@pytest.mark.parametrize("kept", [None, torch.float16, torch.bfloat16])
def test_an_inverse_arrives_to_the_bit_as_it_is_kept(name: str, kept: torch.dtype | None) -> None:
    form, value = FORMS[name], value_of(name, dtype=torch.float32)
    found = solve({name: form.problem(value, torch.full((B,), 0.1), None)})[name]
    assert isinstance(found, Inverse)
    assert found.value is not None
    entry = found.value if kept is None else form.inverse.keep(found.value, kept)

    inverse = entry.load() if isinstance(entry, Stored) else entry

    inverse = (inverse + inverse.mT) / 2 if isinstance(form.inverse, Dense) else inverse  # symmetric to the bit
    arrived = crossed(form.inverse.in_cache(torch.float32, kept), inverse)
    assert torch.equal(arrived, inverse)
    assert arrived.untyped_storage().nbytes() == arrived.nbytes


@every_moment
def test_costs_are_positive(name: str) -> None:
    form = (FORMS | STRUCTURES)[name]

    assert min(form.product_flops, form.inverse_flops, form.row_numbers, form.numbers) > 0


# --- a form of one's own, trained -------------------------------------------------------------------------------------


class Masked(Dense):
    """What the toy approximates, as whole matrices: zeros off the blocks."""

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        mask = torch.block_diag(*[torch.ones(BLOCK, BLOCK)] * (self.shape[-1] // BLOCK))
        return super().moment(rows_BNPD, scale, replicate) * mask.to(rows_BNPD)

    def input_moment(self, rows: InputRows) -> Tensor:
        return self.moment(rows.a_BNPI, 1 / rows.samples, rows.replicate)


class AsMatrices(KFAC):
    """The same by whole matrices."""

    def forms(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> Mapping[str, FactorForm]:
        return {name: Masked((shape.blocks, n, n)) for name, n in {"A": shape.inputs, "G": shape.outputs}.items()}


def trained(method: type[KFAC], rank: int = 0, world_size: int = 1, **settings: object) -> list[Tensor]:
    """Returns the weights after some steps of one batch, of which each rank has its share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KFACConfig, "method", f"{method.__module__}:{method.__name__}")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
        config = {"lr": 0.1, "damping": 0.01, "ema_decay": 0.5, "staleness": FixedInterval(steps=2)} | settings
        optimizer = NGD(model, NGDConfig.model_validate(config))
        x, y = matrix(16, 6), torch.arange(16) % 4
        train(optimizer, model, x.chunk(world_size)[rank], y.chunk(world_size)[rank], 6)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("damping_form", ["pi", "exact"])
def test_a_form_of_ones_own_trains_as_its_whole_matrices_do(damping_form: str) -> None:
    preconditioner = {"kind": "kfac", "damping_form": damping_form}

    ours, reference, plain = (trained(m, preconditioner=preconditioner) for m in (InBlocks, AsMatrices, KFAC))

    for own, expected, other in zip(ours, reference, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(own, other, rtol=1e-3)


def blocks_on_rank(rank: int, world_size: int, strategy: str) -> list[Tensor]:
    return trained(InBlocks, rank, world_size, strategy={"kind": strategy}, staleness=FixedInterval(steps=1))


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["all_reduce", "owner_sharded"])
def test_a_form_of_ones_own_trains_on_several_ranks(strategy: str) -> None:
    alone = trained(InBlocks, staleness=FixedInterval(steps=1))

    for weights in run_ranks(2, blocks_on_rank, strategy):
        for own, expected in zip(weights, alone, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)
