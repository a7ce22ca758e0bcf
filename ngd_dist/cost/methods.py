"""What each method keeps, sends and computes for one layer: the methods of the library as bare numbers.

The numbers are those of `ngd_dist.preconditioners`, which need torch; a test compares them for
every kind of layer. B blocks, n rows of a factor, R kept rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ngd_dist.config import EKFAC, KFAC, LNGD, SENG, SINGD, TKFAC, Eva, NGDConfig
from ngd_dist.cost.card import LayerCard
from ngd_dist.cost.forms import FormCost, block_structure, dense, diagonal, low_rank_structure, plain, root
from ngd_dist.errors import ConfigError
from ngd_dist.factors.cost import ROWS_CHECK, SampleCost

__all__ = [
    "LayerCost",
    "StatisticCost",
    "layer_cost",
    "of_samples",
    "with_few_rows",
    "with_gradient_rows",
]

MAX_STACKED = 2**14  # numbers in the cache of a layer that is stacked with others


@dataclass(frozen=True, slots=True)
class StatisticCost:
    """A statistic of a layer. in_basis: whether it is measured in a basis that the others make.

    is_local: whether it stays on the rank that measured it.
    """

    name: str
    form: FormCost
    in_basis: bool = False
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer under its method. shared: the entries of the cache that every rank needs.

    few_rows: by factor, what stands for it while a step has few rows; none on several ranks. samples: the operations
    by the samples of a rank, for a layer with local statistics. kept_positions: those of each sample.
    """

    card: LayerCard
    statistics: tuple[StatisticCost, ...]
    cache: Mapping[str, FormCost]
    refresh_flops: int
    apply_flops: int
    shared: tuple[str, ...] = ()
    samples: SampleCost | None = None
    kept_positions: int = 1

    @property
    def is_local(self) -> bool:
        """Whether each rank has statistics, and a cache, of its own samples."""
        return any(statistic.is_local for statistic in self.statistics)

    @property
    def sent_numbers(self) -> int:
        """The numbers of its statistics that cross the network."""
        return sum(statistic.form.packed for statistic in self.statistics if not statistic.is_local)

    @property
    def statistic_numbers(self) -> int:
        """The numbers of its statistics' values."""
        return sum(statistic.form.held for statistic in self.statistics)

    @property
    def remembered_numbers(self) -> int:
        """The numbers of the values before the last, which an adaptive schedule compares with."""
        return sum(statistic.form.packed for statistic in self.statistics)

    @property
    def is_stacked(self) -> bool:
        """Whether it is small enough to share its calls with layers that are alike."""
        return self.card.is_stackable and sum(form.packed for form in self.cache.values()) <= MAX_STACKED

    def cached_bytes(self, dtype: str) -> int:
        """Returns the bytes of its cache, if dense inverses are kept in this dtype."""
        return sum(form.cached_bytes(dtype) for form in self.cache.values())


def layer_cost(layer: LayerCard, config: NGDConfig) -> LayerCost:
    """Returns the layer's cost under the configured method. Raises: ConfigError for a method of another package.

    >>> layer = LayerCard(name="0", inputs=9, outputs=4, positions=1)
    >>> layer_cost(layer, NGDConfig()).refresh_flops
    1586
    """
    if layer.fisher == "unit_wise":
        return _unit_wise(layer)
    choice = config.preconditioner
    if layer.has_one_hot_inputs and not choice.takes_one_hot_inputs:
        choice = KFAC()
    match choice:
        case KFAC():
            return _kfac(layer, choice, config.max_dense)
        case EKFAC():
            return _ekfac(layer, config.max_dense)
        case LNGD():
            return _lngd(layer, config.max_dense)
        case SENG():
            return _seng(layer, choice)
        case TKFAC():
            return _tkfac(layer, config.max_dense)
        case Eva():
            return _eva(layer)
        case SINGD():
            return _singd(layer, choice, config.max_dense)
    raise ConfigError(
        f"the planner knows the methods of this package, got {choice.kind}: measure a method of another package, or "
        "plan with one of these"
    )


def of_samples(layer: LayerCost, samples: int) -> LayerCost:
    """Returns the layer on a rank with so many samples, if that decides the size of its statistics."""
    if layer.samples is None:
        return layer
    positions = layer.kept_positions

    def grown(form: FormCost) -> FormCost:
        times = samples**form.sample_dims * (positions if form.is_by_position else 1)
        return replace(form, held=form.held * times, packed=form.packed * times)

    return replace(
        layer,
        statistics=tuple(replace(s, form=grown(s.form)) for s in layer.statistics),
        cache={name: grown(form) for name, form in layer.cache.items()},
        refresh_flops=layer.samples.refresh_flops(samples, positions),
        apply_flops=layer.samples.apply_flops(samples, positions),
    )


def with_few_rows(layer: LayerCost, rows: int) -> LayerCost:
    """Returns the layer while this number of rows stands for each factor that is at least twice as wide.

    The factor is the rows themselves, its inverse [R, R] beside them; what is remembered has the size of a triangle.
    """
    short = {s.name: _of_rows(s.form, rows) for s in layer.statistics if s.form.row_numbers >= 2 * rows}
    if layer.is_stacked or not short or any(not s.form.is_dense for s in layer.statistics):
        return layer
    statistics = tuple(replace(s, form=short.get(s.name, s.form)) for s in layer.statistics)
    inverses = {
        name: replace(form, held=form.blocks * rows**2, is_dense=False) if name in short else form
        for name, form in layer.cache.items()
    }
    entries = layer.card.parameters
    return replace(
        layer,
        statistics=statistics,
        cache=inverses,
        refresh_flops=sum(s.form.inverse_flops for s in statistics),
        apply_flops=entries * sum(s.form.product_flops for s in statistics),
    )


def with_gradient_rows(layer: LayerCost, rows: int) -> LayerCost:
    """Returns the layer while its gradient is made of this number of rows, from which a direction may be cheaper.

    The rule is that of `KFAC.rows_pay` for inverses that are whole matrices.
    """
    B, I, O = layer.card.blocks, layer.card.inputs, layer.card.outputs  # noqa: E741
    if rows > max(I, O) or not all(form.is_dense for form in layer.cache.values()):
        return layer
    by_rows = 2 * rows * B * (I * I + O * O + O * I) + ROWS_CHECK
    return replace(layer, apply_flops=min(by_rows, layer.apply_flops))


def _of_rows(form: FormCost, rows: int) -> FormCost:
    """Returns a dense factor that is kept as the rows of a step: their products with each other, and an inverse."""
    n = form.row_numbers // form.blocks
    return replace(
        form,
        held=form.blocks * rows * n,
        row_flops=2 * form.blocks * rows * n,
        inverse_flops=form.blocks * (2 * rows**3 + 6 * rows**2 * n),
        product_flops=min(4 * rows, form.product_flops),
        is_dense=False,
    )


def _factor(blocks: int, n: int, max_dense: int, rows: int | None = None) -> FormCost:
    if rows is not None and n >= 2 * rows:
        return root(blocks, rows, n)
    return diagonal(blocks, n) if n > max_dense else dense(blocks, n)


def _factors(layer: LayerCard, max_dense: int, rows: int | None = None) -> dict[str, FormCost]:
    B, I, O = layer.blocks, layer.inputs, layer.outputs  # noqa: E741
    A = diagonal(B, I) if layer.has_one_hot_inputs else _factor(B, I, max_dense, rows)
    return {"A": A, "G": _factor(B, O, max_dense, rows)}


def _kfac(layer: LayerCard, choice: KFAC, max_dense: int) -> LayerCost:
    factors = _factors(layer, max_dense, choice.rows)
    statistics = tuple(StatisticCost(name, form) for name, form in factors.items())
    inverse, product = _flops(layer, factors)
    if choice.damping_form == "exact":
        cache = _bases(factors) | {"inverse": plain(layer.parameters)}
        return LayerCost(layer, statistics, cache, 9 * inverse // 2, 2 * product)
    is_scaled = choice.rows is not None and any(not f.has_basis and f.product_flops > 1 for f in factors.values())
    scale = {"scale": plain(layer.blocks)} if is_scaled else {}
    return LayerCost(layer, statistics, factors | scale, inverse, product)


def _ekfac(layer: LayerCard, max_dense: int) -> LayerCost:
    factors = _factors(layer, max_dense)
    statistics = tuple(StatisticCost(name, form) for name, form in factors.items())
    entries = plain(layer.parameters, layer.blocks * layer.inputs, is_entrywise=True)
    inverse, product = _flops(layer, factors)
    bases = _bases(factors)
    cache = bases | {"S": plain(layer.parameters), "damping": plain(1)}
    statistics = (*statistics, StatisticCost("S", entries, in_basis=True))
    return LayerCost(layer, statistics, cache, 9 * inverse // 2, 2 * product, tuple(bases))


def _lngd(layer: LayerCard, max_dense: int) -> LayerCost:
    forms = {
        "Phi": _factor(layer.blocks, layer.inputs, max_dense),
        "Psi": diagonal(layer.blocks, layer.outputs),
    }
    statistics = tuple(StatisticCost(name, form) for name, form in forms.items())
    _, product = _flops(layer, forms)
    refresh = forms["Phi"].inverse_flops + layer.blocks * layer.outputs
    return LayerCost(layer, statistics, forms, refresh, product)


def _seng(layer: LayerCard, choice: SENG) -> LayerCost:
    B, I, O, q = layer.blocks, layer.inputs, layer.outputs, choice.q  # noqa: E741
    is_explicit = choice.max_explicit >= I * O
    sketched = (O, I)
    if q is not None and is_explicit and q * q < O * I:
        sketched = (1, q * q)
    elif q is not None and not is_explicit:
        sketched = (min(O, q), min(I, q))
    has_sketch = sketched != (O, I)
    numbers = (O * I if is_explicit else O + I) + has_sketch
    U = replace(plain(B * numbers), sample_dims=1, is_by_position=not is_explicit)
    cache = {"U": replace(U, is_kept_once=True), "inverse": replace(plain(B), sample_dims=2), "damping": plain(1)}
    nominal = samples = SampleCost(B, O, I, sketched, is_explicit)
    if is_explicit and layer.positions == 1:  # factors, whatever U would be with several positions
        U = replace(plain(B * (O + I + has_sketch)), sample_dims=1)
        cache |= {"U": replace(U, is_kept_once=True)}
        samples = SampleCost(B, O, I, (O, I), is_explicit=False)
    elif has_sketch:
        places = sketched[0] * sketched[1] if is_explicit else sum(sketched)
        cache |= {"sketch": replace(U, held=B * places, packed=B * places), "places": plain(places)}
    kept = layer.positions if choice.r is None or layer.positions <= choice.r else min(choice.r, O)
    return LayerCost(
        layer,
        (StatisticCost("U", U, is_local=True),),
        cache,
        nominal.refresh_flops(),
        nominal.apply_flops(),
        samples=samples,
        kept_positions=kept,
    )


def _tkfac(layer: LayerCard, max_dense: int) -> LayerCost:
    forms = {
        "Phi": _factor(layer.blocks, layer.inputs, max_dense),
        "Psi": _factor(layer.blocks, layer.outputs, max_dense),
    }
    statistics = tuple(StatisticCost(name, form) for name, form in forms.items())
    return LayerCost(layer, statistics, forms, *_flops(layer, forms))


def _eva(layer: LayerCard) -> LayerCost:
    vectors = {"a": plain(layer.blocks * layer.inputs), "g": plain(layer.blocks * layer.outputs)}
    statistics = tuple(StatisticCost(name, form) for name, form in vectors.items())
    refresh = 2 * sum(form.held for form in vectors.values())
    return LayerCost(layer, statistics, vectors | {"damping": plain(layer.blocks)}, refresh, 5 * layer.parameters)


def _singd(layer: LayerCard, choice: SINGD, max_dense: int) -> LayerCost:
    forms = {
        "A": _structure(layer.blocks, layer.inputs, choice, max_dense),
        "G": _structure(layer.blocks, layer.outputs, choice, max_dense),
    }
    statistics = tuple(StatisticCost(name, form) for name, form in forms.items())
    roots = {root: plain(forms[name].held) for name, root in (("A", "K"), ("G", "C"))}
    steps = {f"m_{root}": form for root, form in roots.items()} if choice.momentum else {}
    return LayerCost(layer, statistics, roots | steps, *_flops(layer, forms))


def _structure(blocks: int, width: int, choice: SINGD, max_dense: int) -> FormCost:
    rows = width if choice.rows is None else choice.rows
    if choice.structure == "diagonal" or (choice.structure == "dense" and width > max_dense):
        return replace(diagonal(blocks, width), inverse_flops=10 * blocks * width)
    if choice.structure == "low_rank" and rows < width:
        return low_rank_structure(blocks, width, rows)
    return block_structure(blocks, width, rows)


def _unit_wise(layer: LayerCard) -> LayerCost:
    form = plain(layer.outputs * (3 if layer.inputs == 2 else 1))
    return LayerCost(layer, (StatisticCost("F", form),), {"F": form}, 8 * layer.outputs, 6 * layer.outputs)


def _bases(factors: Mapping[str, FormCost]) -> dict[str, FormCost]:
    """Returns the eigenvectors of the factors: square, not symmetric."""
    return {name: plain(form.held) for name, form in factors.items() if form.has_basis}


def _flops(layer: LayerCard, factors: Mapping[str, FormCost]) -> tuple[int, int]:
    inverse = sum(form.inverse_flops for form in factors.values())
    product = layer.parameters * sum(form.product_flops for form in factors.values())
    return inverse, product
