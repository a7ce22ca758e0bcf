"""The charts of a job's page, without the page around them."""

from ngd_service.dashboard.training import Training
from ngd_service.dashboard.view import View

__all__ = ["laid_out"]


def laid_out() -> Training:
    """Returns all charts, laid out where the caller is; needs a page."""
    training = Training(View())
    training.lay_out_metrics()
    training.lay_out_curvature()
    training.lay_out_step()
    training.lay_out_workers()
    return training
