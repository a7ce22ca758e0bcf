"""The card of a model, from which `ngd_dist.cost` counts: the shapes of its layers, its operations and activations."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ngd_dist.capture.coverage import cover
from ngd_dist.config import NGDConfig
from ngd_dist.cost.card import LayerCard, ModelCard
from ngd_dist.layers import Layer

__all__ = ["card_of"]


def card_of(
    model: nn.Module, inputs: Sequence[Any], config: NGDConfig | None = None, *, samples: int | None = None
) -> ModelCard:
    """Returns the model's card, from one forward pass of a copy on torch's meta device, which computes nothing.

    inputs: the arguments of the pass: tensors whose dimension `config.batch_dim` counts samples, two at least for batch
        norm. config: says which modules to leave out. samples: of the training data, if known.
    Layers are those that NGD would cover. Sizes are per sample; weights and activations keep their dtypes.
    Raises: RuntimeError or NotImplementedError if the model reads numbers of its inputs, as no meta tensor has any.

    >>> card = card_of(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), [torch.zeros(2, 8)])
    >>> card.layers[0].inputs, card.layers[0].positions, card.forward_flops
    (9, 1, 64.0)
    """
    config = config or NGDConfig()
    is_trained = [p.requires_grad for p in model.parameters()]
    model = copy.deepcopy(model).to("meta").train()
    for parameter, trained in zip(model.parameters(), is_trained, strict=True):
        parameter.requires_grad_(trained)
    layers, _ = cover(model, {p for p in model.parameters() if p.requires_grad}, config)
    inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs]
    count = next(x.shape[config.batch_dim] for x in inputs if isinstance(x, Tensor))
    rows, kept = Counter[str](), _Kept(model)
    handles = [handle for layer in layers for handle in layer.watch(_counting(layer, rows))]
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(kept.add, lambda x: x):
        model(*inputs)
    for handle in handles:
        handle.remove()
    covered = sum(layer.shape.blocks * layer.shape.outputs * layer.shape.inputs for layer in layers)
    return ModelCard(
        layers=tuple(_card(layer, max(1, rows[layer.name] // count)) for layer in layers),
        other_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad) - covered,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        activation_bytes=kept.nbytes // count,
        forward_flops=counter.get_total_flops() / count,
        samples=samples,
    )


class _Kept:
    """Adds up the bytes of the tensors that autograd keeps, each storage once, and the model's own not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        of_model = [*model.parameters(), *model.buffers()]
        self._storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in of_model}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage  # kept alive: another one could have its address
            self.nbytes += storage.nbytes()
        return tensor


def _counting(layer: Layer, rows: Counter[str]) -> Callable[[Tensor, Tensor], None]:
    @torch.no_grad()
    def on_run(x: Tensor, output: Tensor) -> None:
        rows[layer.name] += layer.rows(layer.keep(x.detach(), output.detach()), output)

    return on_run


def _card(layer: Layer, positions: int) -> LayerCard:
    shape = layer.shape
    return LayerCard(
        name=layer.name,
        fisher=shape.fisher,
        inputs=shape.inputs,
        outputs=shape.outputs,
        blocks=shape.blocks,
        has_one_hot_inputs=shape.has_one_hot_inputs,
        positions=positions,
        is_stackable=layer.is_stackable,
    )
