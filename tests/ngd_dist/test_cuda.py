"""The oracles on a device: each also runs on the CPU, so that the test itself is tested where there is no GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.inversion import Ending, invert
from tests.reference.fisher import damped_kfac_step

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run make gpu on a machine with one"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def model_and_batch(device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    x, y = torch.randn(12, 2, 6, 6, dtype=torch.float64), torch.randint(5, (12,))
    return model.to(device, dtype), x.to(device, dtype), y.to(device)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> NGD:
    optimizer = NGD(model, NGDConfig(lr=0.05, damping=0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


class Recurrent(nn.Module):
    """Recurrent modules, stacked and from both ends, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.up, self.head = nn.GRU(8, 3, batch_first=True), nn.ConvTranspose1d(3, 2, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.gru(self.lstm(x)[0])
        logits: Tensor = self.head(self.up(outputs.mT).mean(2))
        return logits


@DEVICES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_recurrent_training_agrees_with_float64_on_the_cpu(device: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    reference = Recurrent().double()
    model = copy.deepcopy(reference).to(device, dtype)
    x, y = torch.randn(12, 6, 2, dtype=torch.float64), torch.randint(5, (12,))

    train(reference, x, y, 4)
    train(model, x.to(device, dtype), y.to(device), 4)

    for ours, exact in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), exact.detach(), rtol=tolerance, atol=tolerance)


@DEVICES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_training_agrees_with_float64_on_the_cpu(device: str, dtype: torch.dtype, tolerance: float) -> None:
    reference, x, y = model_and_batch("cpu", torch.float64)
    model, dx, dy = model_and_batch(device, dtype)

    train(reference, x, y, 4)
    train(model, dx, dy, 4)

    for ours, exact in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), exact.detach(), rtol=tolerance, atol=tolerance)


@DEVICES
def test_one_step_is_the_dense_solve(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).to(device, torch.float64)
    x, y = torch.randn(9, 6, dtype=torch.float64).to(device), torch.randint(4, (9,)).to(device)
    before = copy.deepcopy(model)
    optimizer = NGD(model, NGDConfig(lr=1.0, momentum=0.0, damping=0.01, staleness=FixedInterval()))
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    with torch.no_grad():
        residual = logits.softmax(1) - F.one_hot(y, 4)
        a = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    optimizer.step()

    grad_OI = residual.T @ a / 9
    exact = damped_kfac_step(grad_OI.cpu(), (a.T @ a / 9).cpu(), (residual.T @ residual / 9).cpu(), 0.01)
    moved = torch.cat([before.weight - model.weight, (before.bias - model.bias).unsqueeze(1)], dim=1)
    torch.testing.assert_close(moved.detach().cpu(), exact, rtol=1e-9, atol=1e-9)


@DEVICES
@pytest.mark.parametrize("kappa", [1e2, 1e4])
def test_float32_inverse_has_a_small_residual(device: str, kappa: float) -> None:
    basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(0, torch.tensor(kappa).log10().item(), 200, dtype=torch.float64)
    matrix = (basis * eigenvalues @ basis.T).to(device, torch.float32)

    inverse = invert(matrix, torch.tensor(0.0, device=device))

    assert inverse.ending is Ending.OK
    assert inverse.residual < 10 * kappa * torch.finfo(torch.float32).eps


@DEVICES
def test_state_moves_between_devices(device: str) -> None:
    model, x, y = model_and_batch(device, torch.float64)
    optimizer = train(model, x, y, 3)
    twin, tx, ty = model_and_batch("cpu", torch.float64)
    twin.load_state_dict(model.state_dict())
    other = NGD(twin, NGDConfig(lr=0.05, damping=0.1))

    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    for net, opt, bx, by in ((model, optimizer, x, y), (twin, other, tx, ty)):
        opt.zero_grad()
        F.cross_entropy(net(bx), by).backward()
        opt.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-10, atol=1e-10)
