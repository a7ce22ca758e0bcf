"""The exact quadratic model of the loss, M(s) = loss + s^T grad + 1/2 s^T (F + damping I) s, for s made of a few steps.

F is the Gauss-Newton matrix of the objective's loss, mean_n J_n^T H_n J_n: J the derivative of the output by the
weights, H the Hessian of the loss by the output. For cross-entropy and squared error it is the Fisher. H comes from
differentiating the loss that is given, so no likelihood needs to be named.

Everything here sees the batch of this rank only; the optimizer averages the numbers over ranks before it solves.
The model's own hooks run in every evaluation: recorders among them must be paused.

Source: [MG15] sections 6.4, 6.5 and 7.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngd_dist.engines import all_at_rest
from ngd_dist.engines.evaluation import random_state_kept, standing_in
from ngd_dist.errors import ConfigError

__all__ = ["Objective", "curvature_products", "evaluate", "predicted_change", "solve_lengths"]

# Evaluates the model, on the same batch each time: (the loss, as it was differentiated; the output that it is made of).
Objective = Callable[[], tuple[Tensor, Tensor]]

F64 = torch.float64
# Directions whose curvature, relative to the largest, is below this are rounding: float32 products carry 1e-7.
NEGLIGIBLE_CURVATURE = 1e-6
# Of two ways to compute one number, through a deep model in bfloat16: 4e-3 per rounding.
LINEARITY_TOLERANCE = 0.1
WAY_OUT = "or choose another step_length and damping_rule: given, and constant, exponential or polynomial"


def curvature_products(
    model: nn.Module, objective: Objective, tangents: Sequence[Mapping[nn.Parameter, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, 0-d, d_i^T F d_j, [k, k], and d_i^T grad, [k], for steps d in weight space.

    In float64, on the device; grad is that of the objective's loss.

    tangents: k steps; a parameter that a step doesn't name stays where it is. The objective is evaluated k + 1 times:
    J d by forward mode, then the loss. If an operation has no forward derivative, J d comes from differentiating the
    last evaluation backward twice, and its graph is kept until then. All evaluations draw the same random numbers and
    read the same buffers, and leave buffers, random state, weights and gradients as they were. Inside the model,
    detach() stops forward mode as it stops gradients; no_grad() doesn't.

    Attention runs by its plain formula, a model with recurrent modules without cuDNN, and compiled code eagerly: those
    kernels can be differentiated only once.
    Raises: ConfigError if the objective returns something else, or if neither mode works.
    """
    moved = _moved(model, tangents)
    changes, failure = _output_changes(model, objective, tangents)
    leaves = {p: p.detach().requires_grad_() for p in moved}
    with torch.enable_grad(), _undisturbed(model, leaves):
        loss, output = _evaluated(objective)
        gradient = _output_gradient(loss, output)
        if changes is None or _reads_elsewhere(output, moved):
            changes = _output_changes_in_reverse(output, leaves, tangents, failure)
        curved = [_curvature_along(change, gradient, output) for change in changes]
        slopes = [_dot(change, gradient.detach()) for change in changes]
    products = torch.zeros(len(tangents), len(tangents), dtype=F64, device=output.device)
    for i, j in combinations_with_replacement(range(len(tangents)), 2):
        products[i, j] = products[j, i] = _dot(changes[i], curved[j])
    return loss.detach().to(F64), products, torch.stack(slopes)


@torch.no_grad()
def evaluate(model: nn.Module, objective: Objective) -> Tensor:
    """Returns the loss at the present weights, 0-d float64, under the conditions of `curvature_products`.

    Called in the same step, both draw the same random numbers: a change of the loss is due to the weights alone.
    Raises: ConfigError if the objective returns something else than loss and output.
    """
    with _undisturbed(model, {}):
        loss, _ = _evaluated(objective)
    return loss.to(F64)


def solve_lengths(DFD: Tensor, DD: Tensor, Dg: Tensor, damping: float) -> tuple[float, float]:
    """Returns (alpha, mu): the step alpha d_1 + mu d_2 minimises the model; mu is 0 if there is only d_1.

    DFD, DD, Dg: d_i^T F d_j and d_i^T d_j, [k, k], and d_i^T grad, [k], over all ranks. k = 1 or 2; in [MG15] d_1 is
    minus the direction and d_2 the last step. A zero or redundant d gets no more than its share (pseudo-inverse). NaN
    for inputs that are not finite. Waits for the device. Source: [MG15] section 7.
    """
    matrix, slope = _damped(DFD, DD, damping), Dg.to("cpu", F64)
    if not bool(matrix.isfinite().all() and slope.isfinite().all()):
        return float("nan"), float("nan")
    # Scaled to a unit diagonal: the two steps may differ by many orders of magnitude.
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(matrix * scale * scale.unsqueeze(1))
    kept = eigenvalues > NEGLIGIBLE_CURVATURE
    inverses = torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)
    lengths = -scale * (vectors @ (inverses * (vectors.T @ (scale * slope))))
    alpha, mu = (*lengths.tolist(), 0.0)[:2]
    return alpha, mu


def predicted_change(lengths: Sequence[float], DFD: Tensor, DD: Tensor, Dg: Tensor, damping: float) -> float:
    """Returns M(s) - M(0) for the step s = sum_i lengths_i d_i, the divisor of rho; arguments as in `solve_lengths`.

    damping: the model's, as [MG15] section 6.5 has it; 0 leaves damping out. Waits for the device.
    """
    c = torch.tensor(lengths, dtype=F64)
    return float(c @ _damped(DFD, DD, damping) @ c / 2 + c @ Dg.to("cpu", F64))


def _damped(DFD: Tensor, DD: Tensor, damping: float) -> Tensor:
    return DFD.to("cpu", F64) + damping * DD.to("cpu", F64)


# --- J d --------------------------------------------------------------------------------------------------------------


def _output_changes(
    model: nn.Module, objective: Objective, tangents: Sequence[Mapping[nn.Parameter, Tensor]]
) -> tuple[list[Tensor] | None, RuntimeError | None]:
    """Returns J d for each step by forward mode; or None and the error, if some operation has no forward derivative."""
    try:
        return [_output_change(model, objective, tangent) for tangent in tangents], None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # if it is the objective's own, the evaluation that follows raises it again
        return None, error


@torch.no_grad()
def _output_change(model: nn.Module, objective: Objective, tangent: Mapping[nn.Parameter, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        with warnings.catch_warnings():  # torch's own first use of forward mode warns that it scripts its formulas
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            duals = {p: forward_ad.make_dual(p.detach(), d.to(p)) for p, d in tangent.items()}
        with _undisturbed(model, duals):
            _, output = _evaluated(objective)
        change = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if change is None else change.detach()


def _output_changes_in_reverse(
    output: Tensor,
    leaves: Mapping[nn.Parameter, Tensor],
    tangents: Sequence[Mapping[nn.Parameter, Tensor]],
    failure: RuntimeError | None,
) -> list[Tensor]:
    """Returns J d for each step as the derivative by w of <J^T w, d>, which is linear in w.

    leaves: the tensors that stood in for the parameters; reads of a parameter itself count as well.
    """
    w = torch.randn_like(output).requires_grad_()
    read = [(p, x) for p, leaf in leaves.items() for x in (p, leaf) if x.requires_grad]
    changes = []
    try:
        pulled = torch.autograd.grad(output, [x for _, x in read], w, create_graph=True, allow_unused=True)
        for tangent in tangents:
            slope = (w * 0).sum()  # a step that moves nothing the output depends on has a derivative too
            for (p, _), g in zip(read, pulled, strict=True):
                if g is not None and p in tangent:
                    slope = slope + (g * tangent[p].to(g)).sum()
            (change,) = torch.autograd.grad(slope, w, retain_graph=True)
            _check_linear(change, w.detach(), slope.detach())
            changes.append(change)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"the quadratic model needs the derivative of the output along a step, and the model has an operation "
            f"that gives it neither by forward mode ({failure}) nor by differentiating backward twice ({error}); "
            f"build that operation of torch's own ones, {WAY_OUT}"
        ) from error
    return changes


def _check_linear(change: Tensor, w: Tensor, slope: Tensor) -> None:
    """Raises RuntimeError unless <J d, w> = <J^T w, d>: a backward pass outside autograd leaves out its part of J d.

    The kernels of many fused operations do so, and autograd does not notice.
    """
    error = (_dot(change, w) - slope).abs()
    scale = slope.abs().to(F64) + _dot(change * w, change * w).sqrt()
    if bool(error > LINEARITY_TOLERANCE * scale):
        raise RuntimeError("some operation's backward pass can't itself be differentiated")


def _reads_elsewhere(output: Tensor, moved: set[nn.Parameter]) -> bool:
    """Returns whether the output depends on a moved parameter that was not read through its module.

    Such a parameter, from a list or a closure of the model, got no tangent in forward mode. Raises: ConfigError for
    reentrant activation checkpointing, which hides its reads from both modes.
    """
    reads_elsewhere = False
    waiting, seen = [output.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise ConfigError(
                f"the quadratic model can't see through activation checkpointing with use_reentrant=True; "
                f"pass use_reentrant=False, {WAY_OUT}"
            )
        reads_elsewhere = reads_elsewhere or getattr(node, "variable", None) in moved
        waiting.extend(following for following, _ in node.next_functions)
    return reads_elsewhere


# --- H u --------------------------------------------------------------------------------------------------------------


def _output_gradient(loss: Tensor, output: Tensor) -> Tensor:
    """Returns the gradient of the loss by the output, itself differentiable."""
    for name, value in {"loss": loss, "output": output}.items():
        if not value.requires_grad:
            raise ConfigError(f"the objective's {name} doesn't depend on the weights: return it without detach()")
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ConfigError(
            "the objective's loss must be computed from the output that it returns, not from another tensor"
        )
    return gradient


def _curvature_along(change: Tensor, gradient: Tensor, output: Tensor) -> Tensor:
    """Returns H u, u a change of the output."""
    curved, failure = None, "its gradient doesn't depend on the output"
    if gradient.requires_grad:
        try:
            (curved,) = torch.autograd.grad(gradient, output, change, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = str(error)
    if curved is None:
        raise ConfigError(
            f"the quadratic model needs the second derivative of the objective's loss by the output that it returns, "
            f"and there is none ({failure}): return the model's output, not its samples' losses, and build the loss of "
            f"torch's own functions, {WAY_OUT}"
        )
    return curved


def _dot(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * y.to(wide)).sum(dtype=F64)


# --- evaluations that leave no trace ----------------------------------------------------------------------------------


def _moved(model: nn.Module, tangents: Sequence[Mapping[nn.Parameter, Tensor]]) -> set[nn.Parameter]:
    """Returns the parameters that some step moves. Raises: ConfigError if one isn't the model's."""
    moved = {p for tangent in tangents for p in tangent}
    outside = moved - set(model.parameters())
    if outside:
        shapes = sorted(list(p.shape) for p in outside)
        raise ConfigError(
            f"the step moves {len(outside)} parameters that are not the model's, of shapes {shapes}; the quadratic "
            "model needs all parameters of the optimizer in the model that it was given"
        )
    return moved


def _evaluated(objective: Objective) -> tuple[Tensor, Tensor]:
    """Returns the objective's result. Raises: ConfigError if that isn't (loss, output)."""
    result = objective()
    match result:
        case (Tensor() as loss, Tensor() as output) if loss.ndim == 0:
            return loss, output
        case (Tensor() as loss, Tensor()):
            given = f"a loss of shape {list(loss.shape)}"
        case tuple():
            given = f"({', '.join(type(value).__name__ for value in result)})"
        case _:
            given = type(result).__name__
    raise ConfigError(f"the objective must return (loss, output), tensors, the loss a scalar; got {given}")


@contextmanager
def _undisturbed(model: nn.Module, replaced: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Evaluates with these tensors in the parameters' places; afterwards everything is as before."""
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(all_at_rest())
        stack.enter_context(standing_in(model, replaced))
        torch.clear_autocast_cache()  # an autocast around the training loop keeps copies of the weights as they were
        yield
