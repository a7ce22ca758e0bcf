"""What a job trains its model to do."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ngd_workers.contract.spec.base import Function, Options, SpecModel

__all__ = [
    "Erasing",
    "ImageClassification",
    "Labelling",
    "LanguageModelling",
    "Mixup",
    "Regression",
    "TaskChoice",
    "Translation",
    "UserTask",
]


class Mixup(SpecModel):
    """Each image, and its label, is mixed with another: lam of its own and 1 - lam of the other's.

    lam is drawn for each image from Beta(alpha, alpha), and the larger of lam and 1 - lam is taken.
    """

    alpha: float = Field(gt=0, le=100, description="Both parameters of the Beta distribution; near 0: hardly mixed.")
    kind: Literal["running", "batch"] = Field(
        default="running",
        description="running: the other image is that of the rank's previous micro-batch, as it was mixed then; "
        "SP-NGD's ([OT20]). The first micro-batch, also after a resume, stays as it is. "
        "batch: an image of the same micro-batch.",
    )


class Erasing(SpecModel):
    """A rectangle of an image becomes 0, after mixup. The defaults are SP-NGD's ([OT20])."""

    probability: float = Field(default=0.5, ge=0, le=1, description="Share of the images that lose a rectangle.")
    min_area: float = Field(default=0.02, gt=0, le=1, description="Smallest share of the image that is erased.")
    max_area: float = Field(default=0.25, gt=0, le=1, description="Largest share of the image that is erased.")
    min_aspect: float = Field(
        default=0.3, gt=0, le=1, description="Smallest ratio of the rectangle's shorter side to its longer one."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_area < self.min_area:
            raise ValueError(f"max_area must be >= min_area ({self.min_area}), got {self.max_area}; raise it")
        return self


class ImageClassification(SpecModel):
    """One class for each image, or for each row of numbers: cross-entropy."""

    kind: Literal["image_classification"] = "image_classification"
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label's weight that is spread evenly over all classes."
    )
    top: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(min_length=1, description="A label counts as found among so many of the model's best guesses."),
    ] = (1,)
    mixup: Mixup | None = None
    erasing: Erasing | None = None

    @property
    def changes_samples(self) -> bool:
        """Whether a sample differs each time that its loss is computed."""
        return self.mixup is not None or self.erasing is not None


class Labelling(SpecModel):
    """One class for each position of a sample, a pixel or a token: cross-entropy, the mean over labelled positions."""

    kind: Literal["labelling"] = "labelling"
    classes: int | None = Field(default=None, ge=2, le=1_000_000, description="Number of classes; None: the data's.")
    class_dim: Literal[1, -1] = Field(
        default=1,
        description="Dimension of the logits over classes: 1 for [N, C, height, width], -1 for [N, tokens, C].",
    )
    ignore: int = Field(
        default=-100, description="Label of the positions that count for nothing; often 255 in masks of segmentation."
    )


class Regression(SpecModel):
    """Numbers for each sample: the mean squared error over samples and outputs."""

    kind: Literal["regression"] = "regression"
    outputs: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Numbers to predict for each sample; None: the data's."
    )


class LanguageModelling(SpecModel):
    """The next token of a text, at each position: cross-entropy, the mean over tokens. Padding counts for nothing."""

    kind: Literal["language_modelling"] = "language_modelling"


class Translation(SpecModel):
    """A sentence for each sentence: cross-entropy over the target's tokens; on the test data BLEU, too.

    In training the model sees the true tokens before each position. For BLEU it translates by itself, and takes the
    likeliest token at each position (greedy decoding).
    """

    kind: Literal["translation"] = "translation"
    max_length: int | None = Field(
        default=None, ge=1, le=2**20, description="Most tokens of a translation; None: data.max_length."
    )
    bleu_tokenizer: Literal["13a", "intl", "char", "zh", "none"] = Field(
        default="13a", description="sacrebleu's tokenizer: scores are comparable under the same one only."
    )
    bleu_lowercase: Literal[True, False] = Field(default=False, description="Whether BLEU ignores case.")


class UserTask(SpecModel):
    """The user's own `package.module:function`: a training step, or a function that makes a task.

    If its first two parameters are named model and batch, it is a step: called as function(model, batch, **options), it
    returns the mean loss over the batch. If not, it is called once, as function(shape, **options) with the data's
    shape, and returns a `ngd_workers.tasks.base.Task`; a subclass of Task will do.
    """

    kind: Literal["function"] = "function"
    function: Function
    options: Options = Field(default={})


TaskChoice = Annotated[
    ImageClassification
    | Labelling
    | Regression
    | LanguageModelling
    | Translation
    # one choice a line
    | UserTask,
    Field(discriminator="kind"),
]
