"""Natural steps for a GPyTorch model, which classifies a disc: one line beside the Adam of its hyper-parameters."""

import gpytorch
import torch
from torch import Tensor

from ngd_dist.exact import VariationalNGD, gpytorch_pairs

STEPS = 100


class Classifier(gpytorch.models.ApproximateGP):
    def __init__(self, inducing: Tensor) -> None:
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(inducing))
        super().__init__(gpytorch.variational.VariationalStrategy(self, inducing, distribution))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def train(x: Tensor, y: Tensor, natural: bool) -> list[float]:
    """Returns the negative ELBO before each step."""
    model, likelihood = Classifier(x[::10].clone()).double(), gpytorch.likelihoods.BernoulliLikelihood()
    loss_of = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    if natural:
        optimizers = [
            VariationalNGD(gpytorch_pairs(model), gamma=0.1, num_data=len(x), warmup=5),
            torch.optim.Adam(model.hyperparameters(), lr=0.01),
        ]
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.01)]
    losses = []
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = -loss_of(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    x = 2 * torch.rand(300, 2).double() - 1
    y = (x.norm(dim=1) < 0.6).double()
    alone, natural = train(x, y, natural=False), train(x, y, natural=True)
    print(f"Adam alone: a negative ELBO of {alone[19]:.4f} at step 20, {alone[-1]:.4f} at step {STEPS}")
    print("natural steps, and Adam for the hyper-parameters:")
    for step in (1, 5, 10, 20, 50, STEPS):
        print(f"step {step}: loss {natural[step - 1]:.4f}, a negative ELBO")


if __name__ == "__main__":
    main()
