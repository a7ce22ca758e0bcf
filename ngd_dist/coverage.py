"""Which modules of a model are covered by which kind of layer, and why each other parameter is left out."""

from collections import Counter

from torch import nn

from ngd_dist.layers import LAYERS, Layer

__all__ = ["cover"]


def cover(model: nn.Module, updated: set[nn.Parameter]) -> tuple[list[Layer], dict[str, str]]:
    """Returns the covered layers in registration order, and for every other updated parameter of the model the reason.

    A module is covered as a whole or not at all: all its parameters are updated and belong to it alone.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        trained = {key: p for key, p in own.items() if p in updated}
        if not trained:
            continue
        kind = LAYERS.get(type(module))
        if kind is None:
            reason = f"no layer kind covers {type(module).__name__}"
        elif not own.keys() <= {"weight", "bias"}:
            reason = f"{type(module).__name__} has parameters of its own: {', '.join(sorted(own))}"
        elif len(trained) < len(own):
            reason = f"{type(module).__name__} is partly frozen, or partly outside param_groups"
        elif any(uses[id(p)] > 1 for p in own.values()):
            reason = f"{type(module).__name__} shares a parameter with another module"
        else:
            reason = kind.uncovered(module) or ""
        if kind is not None and not reason:
            layers.append(kind(name, module))
        else:
            reasons |= {f"{name}.{key}" if name else key: reason for key in trained}
    return layers, reasons
