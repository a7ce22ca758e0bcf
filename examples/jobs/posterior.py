"""A Gaussian process as a job: `train: {function: posterior:train}`, on any number of workers."""

import gpytorch
import torch
import torch.distributed as dist
from torch import Tensor

from ngd_dist.exact import VariationalNGD, gpytorch_pairs
from ngd_workers.train.own_loop import LoopContext


class Classifier(gpytorch.models.ApproximateGP):
    def __init__(self, inducing: Tensor) -> None:
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(inducing))
        super().__init__(gpytorch.variational.VariationalStrategy(self, inducing, distribution))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def train(context: LoopContext) -> None:
    """Classifies a disc; each rank takes its own part of the points, and all take the step of all points."""
    points = 2 * torch.rand(context.config["points"], 2, generator=torch.Generator().manual_seed(0)).double() - 1
    points = points.to(context.device)
    labels = (points.norm(dim=1) < 0.6).double()
    model = Classifier(points[::10].clone()).double().to(context.device)
    bound = gpytorch.mlls.VariationalELBO(gpytorch.likelihoods.BernoulliLikelihood(), model, num_data=len(points))
    model(points)  # the first call draws a start near the prior; the optimizer then gives all ranks that of rank 0
    natural = VariationalNGD(gpytorch_pairs(model), gamma=0.1, num_data=len(points), warmup=5)
    optimizers = [natural, torch.optim.Adam(model.hyperparameters(), lr=0.01)]
    if (state := context.resume()) is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    mine = slice(context.rank, None, context.world_size)
    while context.step < context.config["steps"]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = -bound(model(points[mine]), labels[mine])
        loss.backward()
        if context.process_group is not None:  # the natural step averages its own gradients
            for value in (loss.detach(), *(parameter.grad for parameter in model.hyperparameters())):
                dist.all_reduce(value.div_(context.world_size), group=context.process_group)
        for optimizer in optimizers:
            optimizer.step()
        context.report({"loss": loss}, samples=len(points))
        stops = context.should_stop()
        if stops or context.step % 10 == 0:
            context.checkpoint({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]})
        if stops:
            return
