"""From directions to steps: the length of a step, its clipping, and the parameters that no layer covers."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ngd_dist.config.choice import Choice

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = [
    "AdamWFallback",
    "ClipChoice",
    "FallbackChoice",
    "GivenLength",
    "KLClip",
    "LayerWise",
    "LengthChoice",
    "NormClip",
    "QuadraticModel",
    "SGDFallback",
]


class SGDFallback(Choice):
    """The gradient takes the direction's place: lr, momentum and weight decay are the param group's."""

    kind: Literal["sgd"] = "sgd"


class AdamWFallback(Choice):
    """torch.optim.AdamW. Its lr falls and rises in proportion with the param group's lr; weight decay is separate."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=0.01, gt=0, description="The lr while the param group has its first lr.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Of the mean of their squares.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of that mean.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, at the fallback's own lr.")


class GivenLength(Choice):
    """Each param group's lr and momentum."""

    kind: Literal["given"] = "given"


class LayerWise(Choice):
    """lr times a factor per layer: d^T grad / (d^T F d + mu), F the empirical Fisher ([L24] eq. 12-13).

    A layer is then predicted to lower the loss by at most lr in a step, so take a smaller one: 0.01, say. Keeps the
    inputs and output gradients of every layer until the step.
    """

    kind: Literal["layer_wise"] = "layer_wise"
    mu: float = Field(default=1e-8, gt=0, description="Keeps the quotient finite; squared gradient units.")


class QuadraticModel(Choice):
    """lr and momentum that minimise the exact quadratic model of the loss in the plane of the direction and the last
    step ([MG15] 7). `NGD.step` needs an objective; each param group's lr and momentum are set to the chosen ones.
    """

    kind: Literal["quadratic_model"] = "quadratic_model"
    needs_objective: ClassVar[bool] = True

    def refuses(self, config: "NGDConfig") -> str | None:
        chosen = {"lr", "momentum"} & config.model_fields_set
        if chosen:
            return f"step_length quadratic_model chooses lr and momentum: leave out {sorted(chosen)}"
        if config.clip is not None:
            return f"step_length quadratic_model chooses the length: leave out clip {config.clip.kind}"
        if config.weight_decay > 0 or config.weight_rescaling != "off":
            return "step_length quadratic_model predicts the whole step: leave out weight_decay and weight_rescaling"
        if isinstance(config.fallback, AdamWFallback):
            return "step_length quadratic_model moves every parameter: leave out fallback adamw"
        if config.momentum_mode != "correct":
            return "step_length quadratic_model chooses momentum: leave out momentum_mode"
        return None


class KLClip(Choice):
    """Preconditioned layers' directions are scaled so that lr^2 d^T F d, twice the step's KL divergence, is bounded.

    d^T F d is taken to be <d, gradient>, as it is for d = F^-1 gradient; damping makes it less.
    """

    kind: Literal["kl"] = "kl"
    max_kl: float = Field(default=1e-3, gt=0, description="Bound on the sum over preconditioned layers.")


class NormClip(Choice):
    """Preconditioned layers' directions are scaled so that their norm as one vector stays bounded."""

    kind: Literal["norm"] = "norm"
    max_norm: float = Field(default=1.0, gt=0, description="Bound on the norm.")


LengthChoice = Annotated[GivenLength | LayerWise | QuadraticModel, Field(discriminator="kind")]
ClipChoice = Annotated[KLClip | NormClip, Field(discriminator="kind")]
FallbackChoice = Annotated[SGDFallback | AdamWFallback, Field(discriminator="kind")]
