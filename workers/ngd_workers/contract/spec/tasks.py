"""What a job trains its model to do."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ngd_workers.contract.spec.base import SpecModel

__all__ = ["ImageClassification", "TaskChoice"]


class ImageClassification(SpecModel):
    """One class for each image: cross-entropy."""

    kind: Literal["image_classification"] = "image_classification"
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label's weight that is spread evenly over all classes."
    )
    top: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(min_length=1, description="A label counts as found among so many of the model's best guesses."),
    ] = (1,)


TaskChoice = Annotated[ImageClassification, Field(discriminator="kind")]
