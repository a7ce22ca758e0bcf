"""Where a job that is submitted comes from: a recipe, the spec of another job, or one of its checkpoints."""

from importlib.resources import files

from ngd_service.client.edits import continued, without_defaults
from ngd_service.client.spec_text import written
from ngd_service.resources import Job

__all__ = ["RECIPES", "clone_address", "fork_address", "recipe", "start"]

RECIPES = files("ngd_workers") / "recipes"
FIRST = "digits"  # its data ship with the package


def clone_address(job_id: str) -> str:
    """Returns the page with the spec of a job."""
    return f"/submit?clone={job_id}"


def fork_address(job_id: str, step: int) -> str:
    """Returns the page with a job that goes on from the checkpoint of this step."""
    return f"/submit?fork={job_id}@{step}"


def start(job: Job | None, *, is_fork: bool, step: int | None) -> tuple[str, str]:
    """Returns the text that the page begins with, and a sentence on where it comes from."""
    if job is None:
        return recipe(FIRST), ""
    if not is_fork:
        return written(without_defaults(job.spec)), f"This is the spec of {job.name} ({job.id}), without its defaults."
    which = "its newest checkpoint" if step is None else f"its checkpoint of step {step:,}"
    said = (
        f"This goes on from {job.name} ({job.id}), {which}: with its step, its weights and the optimizer's state. The "
        f"last step must come after{' that' if step is None else f' {step:,}'}. For the weights alone, at step 0, set "
        "init_from.takes to weights."
    )
    return written(without_defaults(continued(job, step))), said


def recipe(name: str) -> str:
    """Returns the text of a recipe."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
