"""The source of the gradients in the statistics, and the likelihood of a label given the model's output."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ngd_dist.config.choice import Choice, Settings

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = [
    "Bernoulli",
    "Categorical",
    "Empirical",
    "Exact",
    "FisherChoice",
    "Gaussian",
    "LikelihoodChoice",
    "MonteCarlo",
    "Positions",
]


class Categorical(Settings):
    """The model's output are logits of one class: softmax with cross-entropy."""

    kind: Literal["categorical"] = "categorical"
    class_dim: int = Field(
        default=-1, description="Dimension of the output that runs over classes; 1 for [N, C, H, W]."
    )


class Bernoulli(Settings):
    """Each output is the logit of one independent event: binary cross-entropy with logits."""

    kind: Literal["bernoulli"] = "bernoulli"


class Gaussian(Settings):
    """The output is the mean of a normal distribution: squared error / (2 variance), summed over a sample's outputs."""

    kind: Literal["gaussian"] = "gaussian"
    variance: float = Field(
        default=1.0,
        gt=0,
        description="1/2 for the plain squared error; outputs / 2 for torch's mse_loss, which averages them.",
    )


LikelihoodChoice = Annotated[Categorical | Bernoulli | Gaussian, Field(discriminator="kind")]
Positions = Literal["mean", "sum"]
POSITIONS = "Reduction of a sample's loss over its positions (tokens, pixels), if its output has any."


class Empirical(Choice):
    """The gradients of the training loss: no extra backward pass. Vanishes as the loss does."""

    kind: Literal["empirical"] = "empirical"
    positions: Positions = Field(
        default="sum",
        description="sum: damping is in units of the square of a sample's own gradient, which falls with the positions "
        "(tokens, pixels) if its loss is a mean over them. mean: of a position's own gradient, as under the other "
        "Fishers: damping then means the same at any number of positions.",
    )
    class_dim: int = Field(
        default=-1, description="Dimension of the output that runs over classes; 1 for [N, C, H, W]."
    )

    @property
    def takes_one_pass(self) -> bool:
        """Whether one backward pass gives the gradients of a batch."""
        return True


class ModelFisher(Choice):
    """Base of the Fishers of the model's own predictions."""

    def refuses(self, config: "NGDConfig") -> str | None:
        if config.batch_dim != 0:
            return f"fisher {self.kind} counts samples by dimension 0 of the output: leave out batch_dim, or fisher"
        return None


class MonteCarlo(ModelFisher):
    """Gradients for labels drawn from the model's own prediction: one more backward pass per sample, when due."""

    kind: Literal["monte_carlo"] = "monte_carlo"
    likelihood: LikelihoodChoice = Field(
        default=Categorical(), description="The likelihood of a label given the model's output."
    )
    positions: Positions = Field(default="mean", description=POSITIONS)
    samples: int = Field(default=1, ge=1, le=100, description="Labels drawn per prediction.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="With step and rank, decides the drawn labels.")

    @property
    def takes_one_pass(self) -> bool:
        """Whether one backward pass gives the gradients of a batch."""
        return self.samples == 1


class Exact(ModelFisher):
    """Type-2: the expectation over all labels, by one backward pass per output of a sample. For small outputs."""

    kind: Literal["exact"] = "exact"
    likelihood: LikelihoodChoice = Field(
        default=Categorical(), description="The likelihood of a label given the model's output."
    )
    positions: Positions = Field(default="mean", description=POSITIONS)
    max_outputs: int = Field(
        default=128, ge=1, description="Outputs per sample, and so backward passes, that are accepted."
    )

    @property
    def takes_one_pass(self) -> bool:
        """Whether one backward pass gives the gradients of a batch."""
        return False


FisherChoice = Annotated[Empirical | MonteCarlo | Exact, Field(discriminator="kind")]
