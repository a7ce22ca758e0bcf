"""The optimizers of pytorch_optimizer that a job may use, with state that a checkpoint can hold. Start at `build`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting, build_graft
from pytorch_optimizer.optimizer.utils.partition import PreConditionerType
from pytorch_optimizer.optimizer.utils.preconditioner import PreConditioner
from torch import Tensor, nn, optim

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import LAMB, LARS, SOAP, Muon, Plain, Shampoo
from ngd_workers.train.hidden_matrices import hidden_matrices

__all__ = ["BlockShampoo", "EigenSOAP", "build"]


def build(model: nn.Module, choice: Plain) -> optim.Optimizer:
    """Returns the optimizer of all parameters of a model. Raises: SpecError if it can't train the model."""
    for problem in _problems(model):
        raise SpecError(f"optimizer {choice.kind} doesn't fit the model: {problem}")
    return BUILDERS[type(choice)](model, choice)


class EigenSOAP(pytorch_optimizer.SOAP):
    """SOAP that goes on to the same bits from a saved state, under the settings of its param groups.

    Products round by the order in memory, and a saved tensor is contiguous: so are those of every step.
    """

    def init_group(self, group: dict[str, Any], **keywords: Any) -> None:
        super().init_group(group, **keywords)
        for parameter in group["params"]:
            if state := self.state.get(parameter):
                state["precondition_frequency"] = group["precondition_frequency"]
                state["shampoo_beta"] = group["betas"][1]
                state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].contiguous(), state["exp_avg_sq"].contiguous()
                # An axis that is not rotated has an empty list.
                state["Q"] = [axes.contiguous() if isinstance(axes, Tensor) else axes for axes in state["Q"]]


class BlockShampoo(pytorch_optimizer.ScalableShampoo):
    """ScalableShampoo whose state dict is of tensors, and whose steps are the same on every rank."""

    def step(self, closure: Any = None) -> Any:
        # An inverse root starts at random vectors. Those of a job differ by rank, and replicas would drift apart.
        devices = {p.device.index for group in self.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return super().step(closure)

    def init_group(self, group: dict[str, Any], **keywords: Any) -> None:
        super().init_group(group, **keywords)
        beta2 = group["betas"][1]
        for parameter in group["params"]:
            if state := self.state.get(parameter):
                state["pre_conditioner"].beta2, state["pre_conditioner"].w2 = beta2, 1.0 - beta2

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        return content | {"state": {index: _tensors_of(state) for index, state in content["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    self.state[parameter] = self._with_objects(parameter, state, group["betas"][1])

    def _with_objects(self, parameter: Tensor, tensors: dict[str, Any], beta2: float) -> dict[str, Any]:
        """Returns the state of a parameter as the library has it. Raises: ValueError for another shape."""
        conditioner = PreConditioner(
            parameter,
            beta2,
            self.inverse_exponent_override,
            self.block_size,
            self.skip_preconditioning_rank_lt,
            self.no_preconditioning_for_layers_with_dim_gt,
            self.shape_interpretation,
            self.pre_conditioner_type,
            self.matrix_eps,
            self.use_svd,
        )
        for name in ("statistics", "pre_conditioners"):
            there, here = _shapes(tensors[name]), _shapes(getattr(conditioner, name))
            if there != here:
                raise ValueError(f"{name} of a parameter must have the shapes {here}, got {there}")
            setattr(conditioner, name, tensors[name])
        graft = build_graft(parameter, self.graft_type, self.diagonal_eps)
        graft.momentum = tensors["graft_momentum"]
        return {"momentum": tensors["momentum"], "pre_conditioner": conditioner, "graft": graft}


def _tensors_of(state: dict[str, Any]) -> dict[str, Any]:
    conditioner = state["pre_conditioner"]
    return {
        "momentum": state["momentum"],
        "graft_momentum": state["graft"].momentum,
        "statistics": conditioner.statistics,
        "pre_conditioners": conditioner.pre_conditioners,
    }


def _shapes(blocks: Tensor | list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(block.shape) for block in blocks]


def _problems(model: nn.Module) -> Iterator[str]:
    """Yields a sentence for each part of the model that none of these optimizers can train."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield f"layer {name} makes sparse gradients; build it with sparse=False, or take optimizer sgd"
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            yield f"parameter {name} is complex; take optimizer sgd or adamw"


def _lars(model: nn.Module, choice: LARS) -> optim.Optimizer:
    return pytorch_optimizer.LARS(model.parameters(), **choice.model_dump(exclude={"kind"}))


def _lamb(model: nn.Module, choice: LAMB) -> optim.Optimizer:
    return pytorch_optimizer.Lamb(
        model.parameters(),
        lr=choice.lr,
        betas=(choice.beta1, choice.beta2),
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        weight_decouple=False,  # the library's default takes it off the weights, outside of the scaled step
    )


def _muon(model: nn.Module, choice: Muon) -> optim.Optimizer:
    hidden = hidden_matrices(model)
    if not any(parameter.requires_grad for parameter in hidden):
        raise SpecError(
            "optimizer muon doesn't fit the model: it has no hidden matrix to train, for the first and the last weight "
            "and embeddings go by AdamW; add a hidden layer, or take another optimizer"
        )
    inner = {id(parameter) for parameter in hidden}
    of_muon = {
        "params": hidden,
        "use_muon": True,
        "lr": choice.lr,
        "momentum": choice.momentum,
        "nesterov": choice.nesterov,
        "weight_decay": choice.weight_decay,
        "ns_steps": choice.ns_steps,
    }
    of_adamw = {
        "params": [parameter for parameter in model.parameters() if id(parameter) not in inner],
        "use_muon": False,
        "lr": choice.adamw_lr,
        "lr_ratio": choice.adamw_lr / choice.lr,
        "betas": (choice.adamw_beta1, choice.adamw_beta2),
        "eps": choice.adamw_eps,
        "weight_decay": choice.adamw_weight_decay,
    }
    return pytorch_optimizer.Muon([of_muon, of_adamw])


def _soap(model: nn.Module, choice: SOAP) -> optim.Optimizer:
    return EigenSOAP(
        model.parameters(),
        lr=choice.lr,
        betas=(choice.beta1, choice.beta2),
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        precondition_frequency=choice.precondition_frequency,
        max_precondition_dim=choice.max_precondition_dim,
    )


def _shampoo(model: nn.Module, choice: Shampoo) -> optim.Optimizer:
    return BlockShampoo(
        model.parameters(),
        lr=choice.lr,
        betas=(choice.beta1, choice.beta2),
        weight_decay=choice.weight_decay,
        start_preconditioning_step=choice.start_preconditioning_step,
        preconditioning_compute_steps=choice.preconditioning_compute_steps,
        block_size=choice.block_size,
        graft_type=LayerWiseGrafting.SGD,
        pre_conditioner_type=PreConditionerType.ALL,
        nesterov=choice.nesterov,
        matrix_eps=choice.matrix_eps,
    )


BUILDERS: dict[type[Plain], Callable[..., optim.Optimizer]] = {
    LARS: _lars,
    LAMB: _lamb,
    Muon: _muon,
    SOAP: _soap,
    Shampoo: _shampoo,
}
