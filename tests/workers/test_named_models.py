import sys

import pytest
import torch
from torch import nn
from torchvision import models

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Timm, Torchvision, Transformers
from ngd_workers.data import Dataset, Images, Vectors
from ngd_workers.data.tensors import TensorPart
from ngd_workers.launch.attempt import run_rank
from ngd_workers.models import build_model
from ngd_workers.tasks.base import logits_of
from tests.support.attempts import make_attempt, small_spec

RGB = Images(channels=3, height=32, width=32, classes=7)
GREY = Images(channels=1, height=32, width=32, classes=7)
SMALL_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize(
    "choice",
    [
        Torchvision(name="resnet18"),
        Torchvision(name="resnet18", stem="cifar"),
        Torchvision(name="vgg16_bn", stem="cifar"),
        Torchvision(name="mobilenet_v3_small", options={"dropout": 0.0}),
        Timm(name="resnet18", stem="cifar", options={"channels": [8, 8, 8, 8], "stem_width": 8}),
        Timm(name="vit_tiny_patch16_224", options={"img_size": 32, "depth": 1}),
        Transformers(name="ViTForImageClassification", options=SMALL_VIT),
    ],
    ids=lambda choice: f"{choice.kind}-{choice.name}",
)
def test_model_takes_the_data_s_channels_and_gives_its_classes(choice, shape):
    model = build_model(choice, shape)

    logits = logits_of(model(torch.randn(2, shape.channels, 32, 32)))

    assert logits.shape == (2, 7)


@pytest.mark.parametrize("choice", [Torchvision(name="resnet18", stem="cifar"), Timm(name="resnet18", stem="cifar")])
def test_resnet_for_small_images_keeps_their_size_in_the_first_stage(choice):
    model = build_model(choice, RGB)
    sizes = []
    model.layer1.register_forward_hook(lambda module, args, output: sizes.append(output.shape))

    model(torch.randn(2, 3, 32, 32))

    assert sizes == [(2, 64, 32, 32)]
    assert sum(p.numel() for p in model.parameters()) == 11_172_423  # the ResNet-18 of CIFAR-10, for 7 classes


def test_weights_follow_from_torch_s_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return build_model(Torchvision(name="resnet18", stem="cifar"), GREY).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


class Words:
    """The shape of a text: as many words are known."""

    vocabulary = 50


def test_language_model_has_the_data_s_vocabulary():
    choice = Transformers(name="GPT2LMHeadModel", options={"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16})

    model = build_model(choice, Words())

    assert logits_of(model(torch.zeros(2, 5, dtype=torch.long))).shape == (2, 5, 50)


def test_option_goes_before_the_data_s_size():
    options = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 64}  # padded, for speed

    assert build_model(Transformers(name="GPT2LMHeadModel", options=options), Words()).config.vocab_size == 64


@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_model_of_pixels_gives_a_tensor_and_keeps_the_names_of_its_weights(name, shape):
    model = build_model(Torchvision(name=name), shape)

    output = model(torch.randn(2, shape.channels, 32, 48))

    assert isinstance(output, torch.Tensor)
    assert output.shape == (2, 7, 32, 48)
    assert model.state_dict().keys() == models.get_model(name, weights=None, weights_backbone=None).state_dict().keys()


def squares():
    """Returns images of a bright square on a dark ground; each pixel's class is whether it lies in the square."""
    torch.manual_seed(0)
    y = torch.zeros(24, 32, 32, dtype=torch.long)
    for i, (top, left) in enumerate(torch.randint(16, (24, 2)).tolist()):
        y[i, top : top + 16, left : left + 16] = 1
    x = y.float().unsqueeze(1) + 0.1 * torch.randn(24, 1, 32, 32)
    y[:, :2] = 255  # not labelled
    return Dataset(TensorPart(x[:16], y[:16]), TensorPart(x[16:], y[16:]), Images(1, 32, 32, classes=2))


def test_pixels_are_labelled_by_a_model_of_torchvision(tmp_path):
    spec = small_spec(
        data={"kind": "function", "function": "tests.workers.test_named_models:squares"},
        model={"kind": "torchvision", "name": "lraspp_mobilenet_v3_large", "options": {"inter_channels": 16}},
        task={"kind": "labelling", "ignore": 255},
        optimizer={"kind": "adamw", "lr": 0.003},
        schedule={"steps": 3},
        batch={"global_size": 8},
    )

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome.result == "succeeded", outcome.message
    assert set(outcome.metrics) == {"mean_iou", "accuracy", "loss"}


TINY_BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "num_labels": 3,
    "vocab_size": 20,
}


def tagged_tokens():
    """Returns sentences whose words' tags depend on the word alone; the last two of each have none."""
    torch.manual_seed(0)
    x = torch.randint(20, (80, 6))
    y = x % 3
    y[:, 4:] = -100
    return Dataset(TensorPart(x[:64], y[:64]), TensorPart(x[64:], y[64:]))


def test_tokens_are_labelled_by_a_model_of_transformers(tmp_path):
    spec = small_spec(
        data={"kind": "function", "function": "tests.workers.test_named_models:tagged_tokens"},
        model={"kind": "transformers", "name": "BertForTokenClassification", "options": TINY_BERT},
        task={"kind": "labelling", "classes": 3, "class_dim": -1},
        optimizer={"kind": "adamw", "lr": 0.02},
        schedule={"steps": 30},
        batch={"global_size": 32},
    )

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome.message is None
    assert outcome.metrics["accuracy"] > 0.6  # chance is 1/3


@pytest.mark.parametrize(
    ("choice", "shape", "message"),
    [
        (Torchvision(name="resnet81"), RGB, r"the models of torchvision, got 'resnet81' \(did you mean 'resnet18'\?"),
        (Torchvision(name="ssd300_vgg16"), RGB, "must be one of the models of torchvision, got 'ssd300_vgg16'"),
        (Torchvision(name="fcn_resnet50", options={"aux_loss": True}), RGB, "options.aux_loss adds an output that no"),
        (Torchvision(name="fcn_resnet50", options={"weights_backbone": "DEFAULT"}), RGB, "would load weights"),
        (Timm(name="resnet18x"), RGB, r"the models of timm, got 'resnet18x' \(did you mean 'resnet18"),
        (Transformers(name="GPT2LMHedModel"), None, r"got 'GPT2LMHedModel' \(did you mean 'GPT2LMHeadModel'"),
        (Transformers(name="torch"), None, "must be one of the models of transformers, got 'torch'"),
        (Transformers(name="GPT2LMHeadModel", options={"n_layers": 2}), None, r"no field 'n_layers' .*mean 'n_layer'"),
        (
            Torchvision(name="resnet18", options={"width": 2}),
            RGB,
            "torchvision can't make the model .*TypeError.*options",
        ),
        (Torchvision(name="resnet18", options={"weights": "DEFAULT"}), RGB, "options.weights would load weights"),
        (Torchvision(name="densenet121", stem="cifar"), RGB, "stem cifar is for ResNets and VGGs, got 'densenet121'"),
        (Torchvision(name="resnet18"), Vectors(width=3, outputs=2), "model torchvision needs labelled images"),
    ],
)
def test_model_that_cannot_be_had_is_refused_with_the_way_out(choice, shape, message):
    with pytest.raises(SpecError, match=message):
        build_model(choice, shape)


@pytest.mark.parametrize(
    "choice", [Timm(name="resnet18"), Transformers(name="ViTForImageClassification")], ids=lambda choice: choice.kind
)
def test_missing_library_is_named_with_its_extra(monkeypatch, choice):
    monkeypatch.setitem(sys.modules, choice.kind, None)

    with pytest.raises(SpecError, match=rf"needs the library {choice.kind}: .*install ngd-workers\[models\]"):
        build_model(choice, RGB)


def test_models_are_modules_in_the_state_of_training():
    assert all(module.training for module in build_model(Torchvision(name="resnet18"), RGB).modules())
    assert isinstance(build_model(Timm(name="resnet18"), RGB), nn.Module)
