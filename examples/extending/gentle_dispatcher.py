"""A dispatcher of another package: attempts are processes of this machine that leave the processor to others.

    PYTHONPATH=examples/extending NGD_DISPATCHER=gentle_dispatcher:GentleDispatcher NGD_NICENESS=15 ngd serve

A dispatcher derives from `Dispatcher` (ngd_service/dispatchers/base.py) and says there which facts and which calls it
has. This one changes the command alone and takes the rest from the local dispatcher.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, Field

from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.local import LocalDispatcher
from ngd_service.failpoint import Failpoint


class GentleSettings(BaseModel):
    """Each field is a setting of the service: this one is read from NGD_NICENESS."""

    niceness: int = Field(10, ge=0, le=19, description="Niceness of the drivers; 19 leaves most to others.")


class GentleDispatcher(LocalDispatcher):
    """Starts `nice -n NICENESS command ATTEMPT_DIR`."""

    settings_class = GentleSettings

    @classmethod
    def of(cls, settings: GentleSettings, files: AttemptFiles, *, command: Sequence[str], failpoint: Failpoint) -> Self:
        return cls(files, command=("nice", "-n", str(settings.niceness), *command), failpoint=failpoint)
