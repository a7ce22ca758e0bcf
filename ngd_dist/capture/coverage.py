"""Finds the kind of layer that covers each module of a model, and the reason for each parameter that is left out."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ngd_dist.config import AdamWFallback, NGDConfig
from ngd_dist.engines import class_of
from ngd_dist.errors import ConfigError
from ngd_dist.layers import Layer, kind_of

__all__ = ["check_held", "check_owned", "check_sparse", "cover"]


def check_held(layers: Iterable[Layer]) -> None:
    """Returns if the modules still hold the parameters of their layers. Raises: ConfigError that names the first."""
    for layer in layers:
        for name in layer.replaced():
            raise ConfigError(
                f"{class_of(layer.module).__name__} {layer.name!r} no longer holds the {name} that NGD was built with: "
                "weight_norm, pruning, an engine or an assignment has put another in its place; do that before you "
                "build NGD"
            )


def check_owned(groups: Sequence[Mapping[str, Any]], known: Collection[nn.Parameter]) -> None:
    """Returns if the param groups hold only parameters that NGD was built with. Raises: ConfigError."""
    if any(p not in known for group in groups for p in group["params"]):
        raise ConfigError(
            "param_groups hold parameters that NGD was not built with. If an engine that was given this "
            "optimizer has put its own in their place: build the engine first, and NGD on it. If you have "
            "changed them: parameters come in by add_param_group"
        )


def check_sparse(model: nn.Module, plain: Collection[nn.Parameter], config: NGDConfig) -> None:
    """Returns if the fallback can update these parameters. Raises: ConfigError for sparse gradients under AdamW."""
    adamw = set(plain) if isinstance(config.uncovered, AdamWFallback) else set()
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and any(p in adamw for p in module.parameters(recurse=False)):
            raise ConfigError(
                f"{class_of(module).__name__} {name!r} has sparse=True, and fallback adamw needs dense gradients: set "
                "sparse=False, or take fallback sgd"
            )


def cover(model: nn.Module, updated: set[nn.Parameter], config: NGDConfig) -> tuple[list[Layer], dict[str, str]]:
    """Returns the covered layers in registration order, and for every other updated parameter of the model the reason.

    A module is covered as a whole or not at all: all its parameters are updated and belong to it alone.
    Raises: ConfigError for an `exclude` that names nothing.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    batch_dims = _batch_dims(model, config.batch_dim)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    covered: set[nn.Parameter] = set()
    known = {name for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        uncovered = {key: p for key, p in module.named_parameters(recurse=False) if p not in covered}
        trained = {key: p for key, p in uncovered.items() if p in updated}
        if not trained:
            continue
        of_module: list[Layer] = []
        reason = "excluded" if _is_excluded(name, config.exclude) else _uncovered(module)
        if not reason:
            of_module = _split_module(name, module, batch_dims[module])
            known.update(layer.name for layer in of_module)
            held = [p for layer in of_module for p in layer.parameters]
            if any(_is_excluded(layer.name, config.exclude) for layer in of_module):
                reason = "excluded"
            elif any(p not in updated for p in held):
                reason = f"{class_of(module).__name__} is partly frozen, or partly outside param_groups"
            elif any(uses[id(p)] > 1 for p in held):
                reason = f"{class_of(module).__name__} shares a parameter with another module"
            elif not set(uncovered.values()) <= set(held):
                extra = sorted(key for key, p in uncovered.items() if p not in set(held))
                reason = f"{class_of(module).__name__} has parameters of its own: {', '.join(extra)}"
        if reason:
            reasons |= {f"{name}.{key}" if name else key: reason for key in trained}
        else:
            layers += of_module
            covered.update(p for layer in of_module for p in layer.parameters)
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                f"exclude names no module or layer: {pattern!r}; explain() lists the layers, such as {max(known)!r}"
            )
    return layers, reasons


def _batch_first(module: nn.Module) -> object:
    """Returns `batch_first` of torch's sequence modules; those made of encoder layers have it in their attention."""
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = next(iter(module.layers), module)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return getattr(module, "batch_first", None)


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern names the module or layer, or one around it."""
    words = name.split(".")
    around = [".".join(words[:length]) for length in range(1, len(words) + 1)]
    return any(fnmatchcase(outer, pattern) for outer in around for pattern in patterns)


def _uncovered(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None and any(True for _ in module.children()):
        return f"a parameter of {class_of(module).__name__} itself, outside its layers"
    if kind is None:
        return f"no layer kind covers {class_of(module).__name__}"
    if not isinstance(getattr(module, "weight", nn.Parameter()), nn.Parameter | None):
        return f"{class_of(module).__name__} computes its weight from other parameters"
    if not isinstance(getattr(module, "bias", None), nn.Parameter | bool | None):
        return f"{class_of(module).__name__} computes its bias from other parameters"
    return kind.uncovered(module) or ""


def _split_module(name: str, module: nn.Module, batch_dim: int) -> list[Layer]:
    kind = kind_of(module)
    assert kind is not None
    return kind.split_module(name, module, batch_dim=batch_dim)


def _batch_dims(model: nn.Module, default: int) -> dict[nn.Module, int]:
    """Returns the sample dimension of each module: torch's sequence modules set it for the modules inside."""
    dims: dict[nn.Module, int] = {}
    for module in model.modules():  # parents before children
        batch_first = _batch_first(module)
        dims.setdefault(module, default)
        if isinstance(batch_first, bool):
            for inner in module.modules():
                dims[inner] = 0 if batch_first else 1
    return dims
