"""Models of torchvision, timm and transformers, as they come: what is covered, what is not and why, and a few steps."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, LNGD, SENG, SINGD, TKFAC, AdamWFallback, Eva, FixedInterval, Settings
from ngd_dist.factors.dense import Dense

VOCABULARY, TOKENS = 50, 7


def resnet() -> tuple[nn.Module, Tensor]:
    blocks = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(blocks, [1, 1, 1, 1], num_classes=5, width_per_group=4), torch.randn(4, 3, 32, 32)


def vgg() -> tuple[nn.Module, Tensor]:
    features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 512, "M"], batch_norm=True)
    model = torchvision.models.VGG(features, num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    model.classifier = nn.Sequential(nn.Linear(512, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
    return model, torch.randn(4, 3, 16, 16)


def vit() -> tuple[nn.Module, Tensor]:
    size: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_base_patch16_224", num_classes=5, **size), torch.randn(4, 3, 32, 32)


def torchvision_vit() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.VisionTransformer(32, 16, 2, 3, 24, 48, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zero at first: no gradient would reach the rest
    return model, torch.randn(4, 3, 32, 32)


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits


def bert() -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=5, max_position_embeddings=16, **sizes)
    return Logits(transformers.BertForSequenceClassification(config)), torch.randint(VOCABULARY, (4, TOKENS))


def gpt2() -> tuple[nn.Module, Tensor]:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    return Logits(transformers.GPT2LMHeadModel(config)), torch.randint(VOCABULARY, (4, TOKENS))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "torchvision resnet": resnet,
    "torchvision vgg": vgg,
    "torchvision vit": torchvision_vit,
    "timm vit": vit,
    "transformers bert": bert,
    "transformers gpt2": gpt2,
}
# What is left to the fallback: free-standing parameters, and weights that two modules share.
LEFT = {
    "torchvision resnet": set(),
    "torchvision vgg": set(),
    "torchvision vit": {"class_token", "encoder.pos_embedding"},
    "timm vit": {"cls_token", "pos_embed"},
    "transformers bert": set(),
    "transformers gpt2": {"model.transformer.wte.weight", "model.lm_head.weight"},
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if logits.ndim == 3:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    return F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_registers_as_it_comes(name: str) -> None:
    torch.manual_seed(0)
    model, _ = MODELS[name]()

    optimizer = NGD(model)

    assert set(optimizer.plain_parameters) == LEFT[name]
    covered = [p for layer in optimizer.layers for p in layer.parameters]
    assert len(set(covered)) == len(covered)
    left = {dict(model.named_parameters(remove_duplicate=False))[name] for name in LEFT[name]}
    assert set(covered) | left == set(model.parameters())


@pytest.mark.parametrize(
    "method",
    [KFAC(), KFAC(damping_form="exact"), EKFAC(), LNGD(), TKFAC(), Eva(), SINGD(), SENG()],
    ids=lambda method: method.kind,
)
@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_lower_the_loss(name: str, method: Settings) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # max_dense spares the 2,048 channels of ResNet's end, which no smaller width of it takes away.
    settings = {"preconditioner": method, "fallback": AdamWFallback(), "max_dense": 300, "lr": 0.005}
    config = NGDConfig.model_validate({**settings, "staleness": FixedInterval(steps=4)})
    optimizer = NGD(model, config)

    losses = []
    for _ in range(7):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert all(optimizer._curvature.caches[layer.name] is not None for layer in optimizer.layers)
    assert optimizer.stats.failed_inversions == 0


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns the model at full size without its numbers."""
    with torch.device("meta"):
        return build()


def test_resnet50_has_the_sizes_of_the_paper() -> None:
    optimizer = NGD(on_meta(torchvision.models.resnet50))

    packed: Counter[str] = Counter()
    for key, statistic in optimizer._curvature.statistics.items():
        packed[key.statistic] += statistic.spec.form.numbers
    channels = sum(layer.shape.outputs for layer in optimizer.layers if layer.shape.fisher == "unit_wise")
    assert len(optimizer.layers) == 107
    assert sum(p.numel() for layer in optimizer.layers for p in layer.parameters) == 25_557_032
    # The 62.3 M of A are those without the last layer's bias; it adds a row of 2,049.
    assert packed["A"] == pytest.approx(62.3e6, rel=2e-3)
    assert packed["G"] == pytest.approx(14.6e6, rel=5e-3)
    assert channels == 26_560
    assert packed["F"] == 3 * channels == 79_680
    # A batch norm's whole block would have 2 C (2 C + 1) / 2 numbers.
    whole = sum(s.outputs * (2 * s.outputs + 1) for s in (layer.shape for layer in optimizer.layers) if s.inputs == 2)
    assert whole == pytest.approx(56.4e6, rel=1e-3)
    traffic = 4 * (packed["A"] + packed["G"] + sum(p.numel() for p in optimizer.param_groups[0]["params"]))
    assert traffic == pytest.approx(410e6, rel=5e-3)


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (torchvision.models.vgg16, 16),
        (lambda: timm.create_model("vit_base_patch16_224"), 12 * 6 + 3),
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig()), None),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()), 12 * 6 + 2),
    ],
    ids=["vgg16", "vit-b16", "bert-base", "gpt2"],
)
def test_a_full_size_model_registers_and_explains_itself(build: Callable[[], nn.Module], layers: int | None) -> None:
    optimizer = NGD(on_meta(build))

    table = optimizer.explain()

    assert layers is None or len(optimizer.layers) == layers
    assert all(layer.name in table for layer in optimizer.layers)
    assert all(f"{name} " in table for name in optimizer.plain_parameters)
    widest = max(
        max(spec.shape)
        for covered in optimizer._covered.values()
        for spec in covered.method.statistics
        if isinstance(spec.form, Dense)
    )
    assert widest <= optimizer.config.max_dense


def test_a_head_wider_than_the_bound_keeps_a_diagonal() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 40)).double(), torch.randn(8, 3).double()
    reference = copy.deepcopy(model)
    optimizer = NGD(model, NGDConfig(max_dense=10, momentum=0.0))
    F.cross_entropy(model(x), torch.arange(8)).backward()
    captured = optimizer._capture.take()
    G = {str(key): value for key, value in captured.items()}["2.G"]
    assert "G 40" in optimizer.explain()
    optimizer.step()

    full = NGD(reference)
    F.cross_entropy(reference(x), torch.arange(8)).backward()
    dense = {str(key): value for key, value in full._capture.take().items()}["2.G"]
    assert G.shape == (1, 40)
    torch.testing.assert_close(G[0], dense[0].diagonal())
