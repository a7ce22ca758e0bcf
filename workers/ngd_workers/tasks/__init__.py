"""Tasks by name. Start at `build_task`; `base` has the contract.

A new task is a file here, a line in TASKS and a class in contract/spec/tasks.py. Imports without torch, so that a name
can be checked where torch is not installed.
"""

from typing import TYPE_CHECKING, Any

from ngd_workers.contract.spec import TaskChoice
from ngd_workers.functions import load_function

if TYPE_CHECKING:
    from ngd_workers.tasks.base import Task

__all__ = ["TASKS", "build_task"]

TASKS: dict[str, str] = {
    "image_classification": "ngd_workers.tasks.image_classification:build",
    "labelling": "ngd_workers.tasks.labelling:build",
    "regression": "ngd_workers.tasks.regression:build",
    "function": "ngd_workers.tasks.user_task:build",
    "language_modelling": "ngd_workers.tasks.language_modelling:build",
    "translation": "ngd_workers.tasks.translation:build",
}


def build_task(choice: TaskChoice, shape: Any) -> "Task":
    """Returns the task for data of this shape. Raises: SpecError, UserCodeError."""
    task: Task = load_function(TASKS[choice.kind])(choice, shape)
    return task
