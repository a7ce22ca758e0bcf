"""The engines that drive a job's model. An engine is one file with a subclass of `Engine`, and one entry of `ENGINES`.

Its settings are a class in `ngd_workers.contract.spec.engines`.
"""

from ngd_workers.contract.spec import JobSpec
from ngd_workers.train.engines.bare import BareEngine
from ngd_workers.train.engines.base import Engine
from ngd_workers.train.engines.ddp import DDPEngine
from ngd_workers.train.engines.deepspeed import DeepSpeedEngine
from ngd_workers.train.engines.fsdp import FSDPEngine

__all__ = ["ENGINES", "Engine", "engine_of"]

ENGINES: dict[str, type[Engine]] = {
    "bare": BareEngine,
    "ddp": DDPEngine,
    "fsdp": FSDPEngine,
    "deepspeed": DeepSpeedEngine,
}


def engine_of(spec: JobSpec) -> type[Engine]:
    """Returns the engine of the spec, or the default of its optimizer."""
    return ENGINES[spec.effective_engine.kind]
