"""SENG: the empirical Fisher block of a rank's own samples, inverted by the Sherman-Morrison-Woodbury identity."""

from collections.abc import Mapping
from zlib import crc32

import torch
from torch import Tensor

from ngd_dist.config import SENG as SENGConfig
from ngd_dist.factors.cost import LayerShape, SampleCost
from ngd_dist.factors.form import Form
from ngd_dist.factors.samples import Explicit, Implicit, SampleGradients, truncated
from ngd_dist.inversion import Ending, Inverse, Problem, Solution, ToInvert
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["SENG"]


class SENG(Preconditioner):
    """The direction (lambda I + U U^T)^-1 grad = (grad - U (lambda I + U^T U)^-1 U^T grad) / lambda. Source: [Y22].

    U has a column for each sample of this rank: its gradient over sqrt(N). Every rank has a U, an N x N inverse and a
    direction of its own. Of a sketch S, U^T U and U^T grad are those of S U and S grad; the last product with U is not
    sketched.
    """

    def __init__(self, shape: LayerShape, config: SENGConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._config = config
        blocks, outputs, inputs = shape.gradient
        is_explicit = outputs * inputs <= config.max_explicit
        kind: type[Explicit | Implicit] = Explicit if is_explicit else Implicit
        self._form: SampleGradients = kind.of(blocks, outputs, inputs)
        self._sketch = None if config.q is None else self._form.sketch(config.q)
        if self._sketch is not None:
            self._form = kind.of(blocks, outputs, inputs, has_draw=True)
        self.statistics = (StatisticSpec("U", self._form, reduction="local"),)
        entries: dict[str, Form] = {"U": self._form, "inverse": _Inverse((blocks, 1, 1)), "damping": Form(())}
        if self._sketch is not None:
            places = self._sketch.inputs + (0 if is_explicit else self._sketch.outputs)
            entries |= {"sketch": self._sketch, "places": Form((places,))}
        self.entries = entries
        sketched = self._sketch or self._form
        self._cost = SampleCost(blocks, outputs, inputs, (sketched.outputs, sketched.inputs), is_explicit)

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        if "U" not in due:
            return {}
        a_BNPI, g_BNPO = batch.a_BNPI, batch.g_BNPO
        if self._config.r is not None and isinstance(self._form, Implicit):
            a_BNPI, g_BNPO = truncated(a_BNPI, g_BNPO, self._config.r)
        return {"U": self._form.of_rows(a_BNPI, g_BNPO, batch.replicate)}

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns the inverse of lambda I + U^T U. An old one belongs to other samples."""
        U, sketched = statistics["U"], self._sketched(statistics["U"]).get("sketch")
        if self._sketch is None or sketched is None:
            gram = self._form.products(U, U)
        else:
            gram = self._sketch.products(sketched, sketched)
        return {"U": ToInvert(gram, gram.new_full((len(gram),), damping))}

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        solution = solutions["U"]
        assert isinstance(solution, Inverse)
        if solution.value is None:
            return Refreshed(old, {"U": solution.ending})
        U = statistics["U"]
        cache = {"U": U, "inverse": solution.value, "damping": U.new_tensor(damping)}
        return Refreshed(cache | self._sketched(U), {"U": Ending.OK})

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        form, U = self._form, cache["U"]
        if self._sketch is None or "sketch" not in cache:
            products_BN = form.along(U, grad_BOI)
        else:
            entries = form.entries(grad_BOI, cache["places"], self._sketch) * self._scale**0.5
            products_BN = self._sketch.along(cache["sketch"], entries)
        v_BN = (cache["inverse"] @ products_BN.unsqueeze(-1)).squeeze(-1)
        if isinstance(form, Implicit) and self._config.product == "of_sums":
            return (grad_BOI - form.combined_of_sums(U, v_BN)).div_(cache["damping"])
        return (grad_BOI - form.combined(U, v_BN)).div_(cache["damping"])

    def refresh_flops(self) -> int:
        return self._cost.refresh_flops()

    def apply_flops(self) -> int:
        return self._cost.apply_flops()

    @property
    def _scale(self) -> float:
        """The factor on sketched products, U^T U and U^T grad."""
        assert self._sketch is not None
        share = self._sketch.inputs * self._sketch.outputs / (self._form.inputs * self._form.outputs)
        return 1 / share if self._config.scale == "unbiased" else share**-2

    def _sketched(self, U: Tensor) -> Cache:
        """Returns S U and the places of the entries that S keeps, drawn for this value; nothing without a sketch."""
        if self._sketch is None or not self._form.takes_sketch(U):
            return {}
        seed = crc32(f"{self._config.seed} {self.shape.name} {self._form.draw(U)}".encode())
        places = self._form.drawn(self._sketch, torch.Generator().manual_seed(seed)).to(U.device, torch.int32)
        sketch = self._form.sketched(U, places, self._sketch)
        return {"sketch": self._sketch.times(sketch, self._scale), "places": places}


class _Inverse(Form):
    """(lambda I + U^T U)^-1, [B, N, N]."""

    sample_dims = (1, 2)
