"""The models that a job may train."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ngd_workers.contract.spec.base import Function, Options, SpecModel

__all__ = [
    "GPT",
    "MLP",
    "EncoderDecoder",
    "InitChoice",
    "InitFromCheckpoint",
    "InitFromFile",
    "ModelChoice",
    "SmallCNN",
    "Timm",
    "Torchvision",
    "Transformers",
    "UserModel",
]


class SmallCNN(SpecModel):
    """Three 3x3 convolutions with batch norm and ReLU, two poolings and one hidden linear layer."""

    kind: Literal["small_cnn"] = "small_cnn"
    channels: int = Field(
        default=16, ge=1, le=1024, description="Channels of the first convolution; the other two have twice as many."
    )
    hidden: int = Field(default=64, ge=1, le=16384, description="Units of the hidden linear layer.")


class MLP(SpecModel):
    """Linear layers with ReLU between them."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(description="Units of each hidden layer, in order."),
    ] = (128,)


Stem = Annotated[
    Literal["imagenet", "cifar"],
    Field(
        description="cifar: for images of about 32x32. A ResNet begins with a 3x3 convolution of stride 1 and no "
        "pooling; a VGG ends with one linear layer on the mean of its features."
    ),
]


class TransformerSizes(SpecModel):
    """What the Transformers of this package have in common."""

    width: int = Field(default=128, ge=1, le=65536, description="Numbers for each token between the layers.")
    heads: int = Field(default=4, ge=1, le=1024, description="Heads of attention; they divide width.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share set to 0 in training: of embeddings, attention, each layer's sum.",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width ({self.width}), got {self.heads}")
        return self


class GPT(TransformerSizes):
    """A decoder-only Transformer as GPT-2: learned positions, pre-norm blocks, GELU; its head has weights of its own.

    Weights that two modules share are left to the fallback of optimizer ngd.
    """

    kind: Literal["gpt"] = "gpt"
    layers: int = Field(default=4, ge=1, le=1024, description="Blocks of attention and a hidden layer of 4 * width.")


class EncoderDecoder(TransformerSizes):
    """A Transformer for pairs of texts: learned positions, pre-norm blocks, GELU; no weights are shared."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    encoder_layers: int = Field(default=3, ge=1, le=1024, description="Blocks that read the source.")
    decoder_layers: int = Field(default=3, ge=1, le=1024, description="Blocks that write the target.")


class Torchvision(SpecModel):
    """A model of torchvision by its name, with random weights, for the data's channels and classes."""

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(
        max_length=100, description="A name in torchvision.models.list_models(), of images or pixels: fcn_resnet50."
    )
    stem: Stem = "imagenet"
    options: Options = Field(default={}, description="Keyword arguments passed to torchvision's function.")


class Timm(SpecModel):
    """A model of timm by its name, with random weights, for the data's channels and classes.

    Needs ngd-workers[models].
    """

    kind: Literal["timm"] = "timm"
    name: str = Field(
        max_length=100, description="A name that timm.list_models() gives: resnet50d, vit_tiny_patch16_224."
    )
    stem: Stem = "imagenet"
    options: Options = Field(default={}, description="Keyword arguments passed to timm.create_model.")


class Transformers(SpecModel):
    """A model class of transformers with random weights. Needs ngd-workers[models].

    The vocabulary, the number of classes and the size of images follow from the data where the configuration has such
    fields and `options` does not set them.
    """

    kind: Literal["transformers"] = "transformers"
    name: str = Field(
        max_length=100, description="A class of transformers: GPT2LMHeadModel, BertForTokenClassification."
    )
    options: Options = Field(default={}, description="Fields of the model's configuration: {n_layer: 12, n_embd: 768}.")


class UserModel(SpecModel):
    """The user's own `package.module:function`, called with the data's shape; it must return a `torch.nn.Module`."""

    kind: Literal["function"] = "function"
    function: Function
    options: Options = Field(default={})


ModelChoice = Annotated[
    SmallCNN
    | MLP
    | GPT
    | EncoderDecoder
    | Torchvision
    | Timm
    | Transformers
    # one choice a line
    | UserModel,
    Field(discriminator="kind"),
]

Ignore = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=200)], ...],
    BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
    Field(description="Weights that keep their first values, such as a head of another size; * matches any text."),
]


class InitFromFile(SpecModel):
    """The first weights are those of a file: a state dict in .pt or .safetensors."""

    kind: Literal["file"] = "file"
    path: str = Field(description="The file; a relative path starts at NGD_DATA_DIR or --data-dir.")
    ignore: Ignore = ()


class InitFromCheckpoint(SpecModel):
    """The first weights are those of another job's checkpoint, or training goes on from there."""

    kind: Literal["checkpoint"] = "checkpoint"
    run_dir: str = Field(
        description="The other job's folder, which holds checkpoints/; a relative path starts at the folder that holds "
        "this job's own, so that a job's id is enough under the service."
    )
    step: int | None = Field(default=None, ge=1, description="Step of the checkpoint; None: the newest.")
    takes: Literal["weights", "everything"] = Field(
        default="weights",
        description="weights: the job begins at step 0 with them. everything: it goes on from the checkpoint's step, "
        "with the optimizer's state; settings that differ from that job's count from there on.",
    )
    ignore: Ignore = ()

    @model_validator(mode="after")
    def _ignores_weights_alone(self) -> Self:
        if self.ignore and self.takes == "everything":
            raise ValueError(
                "init_from.ignore leaves out weights, and takes everything needs all; leave one of them out"
            )
        return self


InitChoice = Annotated[InitFromFile | InitFromCheckpoint, Field(discriminator="kind")]
