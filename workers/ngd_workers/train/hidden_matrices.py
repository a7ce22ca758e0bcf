"""The rule by which Muon trains a parameter of a model, or AdamW does."""

from torch import nn

__all__ = ["hidden_matrices"]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Returns the matrices between the first and the last weight of a model, in the model's order.

    A weight is a parameter of two dimensions or more whose own name contains "weight", as in torch's layers and in
    transformers'; positions and class tokens are called otherwise. The first and the last one in the model's order, and
    those of embeddings, are no hidden matrices, also where another layer shares them.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 2))
    >>> [tuple(matrix.shape) for matrix in hidden_matrices(model)]
    [(9, 8)]
    """
    everywhere = model.named_parameters(remove_duplicate=False)  # a tied head is the last weight, though not a new one
    weights = [p for path, p in everywhere if p.ndim > 1 and "weight" in _own_name(path)]
    outer = {id(weight) for weight in (*weights[:1], *weights[-1:])}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            outer |= {id(p) for p in module.parameters()}
    return list({id(p): p for p in weights if id(p) not in outer}.values())


def _own_name(path: str) -> str:
    """Returns the last part of a parameter's path; of `parametrizations.weight.original` it is `weight`."""
    *_, parent, name = ("", *path.split("."))
    return parent if name == "original" else name
