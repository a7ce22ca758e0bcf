"""The rivals, each built as its documentation says, with lr, momentum and damping of one size."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trainer import DAMPING, MOMENTUM, Peer, Refresh, Setting, Training

__all__ = ["RIVALS"]

# --- first-order ------------------------------------------------------------------------------------------------------

MOMENTS = {"momentum": "momentum", "exp_avg": "momentum"}


def _plain(make: Callable[[nn.Module, Setting], Any], kinds: dict[str, str] = MOMENTS) -> Any:
    def build(model: nn.Module, setting: Setting) -> Training:
        optimizer = make(model, setting)
        return Training("", model, lambda x, y: optimizer.step(), optimizer, kinds)

    return build


def _sgd(model: nn.Module, setting: Setting) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=MOMENTUM)


def _lamb(model: nn.Module, setting: Setting) -> Any:
    from pytorch_optimizer import Lamb

    return Lamb(model.parameters(), lr=setting.lr)


def _muon(model: nn.Module, setting: Setting) -> Any:
    """Returns Muon for hidden weights; AdamW for the first and last weight, as its authors say, biases and scales."""
    from pytorch_optimizer import Muon

    weights = [p for p in model.parameters() if p.ndim >= 2]
    hidden = weights[1:-1]
    inner = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in inner]
    return Muon([{"params": hidden, "lr": setting.lr, "use_muon": True}, {"params": rest, "use_muon": False}])


def _heavyball_muon(model: nn.Module, setting: Setting) -> Any:
    return _heavyball().Muon(model.parameters(), lr=setting.lr)


# --- Shampoo's family: statistics at every step, roots or bases every so often ----------------------------------------

SHAMPOO_KINDS = {
    "exp_avg": "momentum",
    "momentum": "momentum",
    "graft": "momentum",
    "GG": "statistics",
    "accumulators": "statistics",
    ".statistics": "statistics",
    "Q": "inverses",
    "preconditioners": "inverses",
    "pre_conditioners": "inverses",
}


def _heavyball() -> Any:
    import heavyball

    heavyball.utils.compile_mode = None  # eager, as all others here
    return heavyball


def _heavyball_soap(model: nn.Module, setting: Setting) -> Any:
    return _heavyball().SOAP(model.parameters(), lr=setting.lr, precondition_frequency=setting.inverses_every)


def _heavyball_psgd(model: nn.Module, setting: Setting) -> Any:
    chance = 1 / setting.inverses_every
    return _heavyball().PSGDKron(model.parameters(), lr=setting.lr, preconditioner_update_probability=chance)


def _torchzero_soap(model: nn.Module, setting: Setting) -> Any:
    import torchzero

    soap = torchzero.m.SOAP(precond_freq=setting.inverses_every)
    return torchzero.Optimizer(model.parameters(), soap, torchzero.m.LR(setting.lr))


def _soap(model: nn.Module, setting: Setting) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=setting.lr, precondition_frequency=setting.inverses_every)


def _shampoo(model: nn.Module, setting: Setting) -> Any:
    from pytorch_optimizer import ScalableShampoo

    every = setting.inverses_every
    return ScalableShampoo(
        model.parameters(), lr=setting.lr, start_preconditioning_step=1, preconditioning_compute_steps=every
    )


# --- K-FAC's family ---------------------------------------------------------------------------------------------------


def _singd(structure: str) -> Callable[[nn.Module, Setting], Training]:
    def build(model: nn.Module, setting: Setting) -> Training:
        from singd.optim.optimizer import SINGD

        structures = (structure, structure)
        optimizer = SINGD(model, lr=setting.lr, T=setting.inverses_every, structures=structures, warn_unsupported=False)
        covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rest = [p for p in model.parameters() if id(p) not in covered]  # normalisation layers; SINGD leaves them alone
        others = [torch.optim.SGD(rest, lr=setting.lr, momentum=MOMENTUM)] if rest else []

        def update(x: Tensor, y: Tensor) -> None:
            optimizer.step()
            for other in others:
                other.step()

        kinds = {"momentum_buffer": "momentum", ".m_Ks": "inverses", ".m_Cs": "inverses"}
        kinds |= {".Ks": "inverses", ".Cs": "inverses", ".H_": "statistics"}
        return Training("", model, update, [optimizer, others], kinds)

    return build


def _kaisa(method: str) -> Callable[[nn.Module, Setting], Training]:
    def build(model: nn.Module, setting: Setting) -> Training:
        from kfac.preconditioner import KFACPreconditioner

        sgd = _sgd(model, setting)
        preconditioner = KFACPreconditioner(
            model,
            factor_update_steps=setting.statistics_every,
            inv_update_steps=setting.inverses_every,
            damping=DAMPING,
            lr=setting.lr,
            compute_method=method,
        )

        def update(x: Tensor, y: Tensor) -> None:
            preconditioner.step()
            sgd.step()

        kinds = {"momentum_buffer": "momentum", "_inv": "inverses", "_q": "inverses", "_d": "inverses"}
        kinds |= {"_factor": "statistics", "_batch": "statistics"}
        return Training("", model, update, [sgd, preconditioner], kinds)

    return build


def _dp_kfac(model: nn.Module, setting: Setting) -> Training:
    from kfac import backend, get_kfac_module

    backend.init("Torch" if torch.distributed.is_initialized() else "Horovod")
    sgd = _sgd(model, setting)
    preconditioner = get_kfac_module("inverse_dp")(
        model,
        lr=setting.lr,
        damping=DAMPING,
        fac_update_freq=setting.statistics_every,
        kfac_update_freq=setting.inverses_every,
    )

    def update(x: Tensor, y: Tensor) -> None:
        preconditioner.step()
        sgd.step()

    kinds = {"momentum_buffer": "momentum", "m_inv": "inverses", "m_A": "statistics", "m_G": "statistics"}
    return Training("", model, update, [sgd, preconditioner], kinds)


def _lacks_dp_kfac() -> str | None:
    kfac = importlib.import_module("kfac")
    return None if hasattr(kfac, "get_kfac_module") else "the kfac that is importable is kfac-pytorch, not DP-KFAC"


def _lacks_kaisa() -> str | None:
    kfac = importlib.import_module("kfac")
    return None if hasattr(kfac, "preconditioner") else "the kfac that is importable is not kfac-pytorch"


class AsdlTraining(Training):
    """ASDL runs forward and backward itself; on a step with new statistics it returns the samples' sum as the loss."""

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.zero_grad()
        maker = self.holders["maker"]  # type: ignore[index]
        samples = len(x) if maker.do_update_curvature() else 1
        output = maker.setup_model_call(self.model, x)
        maker.setup_loss_call(F.cross_entropy, output, y)
        _, loss = maker.forward_and_backward()
        self.update(x, y)
        return loss.detach() / samples


def _asdl(fisher: str) -> Callable[[nn.Module, Setting], Training]:
    def build(model: nn.Module, setting: Setting) -> Training:
        from asdl import KfacGradientMaker, PreconditioningConfig

        config = PreconditioningConfig(
            data_size=1,
            damping=DAMPING,
            ema_decay=0.05,
            curvature_upd_interval=setting.statistics_every,
            preconditioner_upd_interval=setting.inverses_every,
        )
        maker = KfacGradientMaker(model, config, fisher_type=fisher)
        # Its average starts at 0, uncorrected, so its first inverses are 1 / ema_decay times too large: 1e-3 diverges.
        sgd = torch.optim.SGD(model.parameters(), lr=setting.lr / 10, momentum=MOMENTUM)
        kinds = {"momentum_buffer": "momentum", "inv": "inverses", "kron": "statistics", "unit": "statistics"}
        return AsdlTraining("", model, lambda x, y: sgd.step(), {"maker": maker, "sgd": sgd}, kinds)

    return build


def _curvlinops(model: nn.Module, setting: Setting) -> Training:
    """Returns SGD on K-FAC directions; the library computes its factors in an extra forward and backward pass."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    covered = [p for layer in layers for p in layer.parameters()]
    sgd = _sgd(model, setting)
    held: dict[str, Any] = {"sgd": sgd, "steps": 0}

    def update(x: Tensor, y: Tensor) -> None:
        gradients = [p.grad for p in covered]
        if held["steps"] % setting.inverses_every == 0:
            operator = KFACLinearOperator(
                model, nn.CrossEntropyLoss(), covered, [(x, y)], fisher_type="empirical",
                check_deterministic=False, separate_weight_and_bias=False, num_data=len(x),
                num_per_example_loss_terms=1,
            )  # fmt: skip
            held["inverse"] = KFACInverseLinearOperator(operator, damping=DAMPING, use_heuristic_damping=True)
        for parameter, direction in zip(covered, held["inverse"] @ gradients, strict=True):
            parameter.grad = direction
        held["steps"] += 1
        sgd.step()

    kinds = {"momentum_buffer": "momentum", "_inverse_": "inverses", "_covariances": "statistics"}
    return Training("", model, update, held, kinds)


ONE_INTERVAL: tuple[Refresh, ...] = ("1/1", "10/10")  # one number for both
ROOTS: tuple[Refresh, ...] = ("1/1", "1/10")  # statistics at every step
BOTH: tuple[Refresh, ...] = ("1/1", "1/10", "10/10")

RIVALS: dict[str, Peer] = {
    "sgd": Peer(_plain(_sgd)),
    "kfac-pytorch eigen": Peer(_kaisa("eigen"), "kfac", BOTH, _lacks_kaisa),
    "kfac-pytorch inverse": Peer(_kaisa("inverse"), "kfac", BOTH, _lacks_kaisa),
    "asdl kfac": Peer(_asdl("fisher_emp"), "asdl", BOTH),
    "asdl kfac 1mc": Peer(_asdl("fisher_mc"), "asdl", BOTH),
    "dp-kfac inverse": Peer(_dp_kfac, "kfac", BOTH, _lacks_dp_kfac),
    "curvlinops kfac": Peer(_curvlinops, "curvlinops", ONE_INTERVAL),
    "singd dense": Peer(_singd("dense"), "singd", ONE_INTERVAL),
    "singd diagonal": Peer(_singd("diagonal"), "singd", ONE_INTERVAL),
    "torchzero soap": Peer(_plain(_torchzero_soap, SHAMPOO_KINDS), "torchzero", ROOTS),
    "heavyball soap": Peer(_plain(_heavyball_soap, SHAMPOO_KINDS), "heavyball", ROOTS),
    "heavyball psgd": Peer(_plain(_heavyball_psgd, SHAMPOO_KINDS), "heavyball", ONE_INTERVAL),
    "heavyball muon": Peer(_plain(_heavyball_muon, SHAMPOO_KINDS), "heavyball"),
    "pytorch_optimizer soap": Peer(_plain(_soap, SHAMPOO_KINDS), "pytorch_optimizer", ROOTS),
    "pytorch_optimizer shampoo": Peer(_plain(_shampoo, SHAMPOO_KINDS), "pytorch_optimizer", ROOTS),
    "pytorch_optimizer muon": Peer(_plain(_muon), "pytorch_optimizer"),
    "pytorch_optimizer lamb": Peer(_plain(_lamb), "pytorch_optimizer"),
    "adamw": Peer(_plain(lambda model, setting: torch.optim.AdamW(model.parameters(), lr=setting.lr))),
}
