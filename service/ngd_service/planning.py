"""The plan of a job from a request, for the API and the `ngd` command. Start at `plan_of`. Loads no torch."""

import json
from typing import Any

from pydantic import Field, ValidationError

from ngd_dist.config import NGDConfig, Settings
from ngd_dist.cost.calibration import Measured, calibrated
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import Cluster
from ngd_dist.cost.engines import EngineName
from ngd_dist.cost.plan import Plan, plan
from ngd_dist.cost.setup import DEFAULT_REFRESH_SHARE, FirstOrder, Setup
from ngd_dist.errors import ConfigError
from ngd_workers.contract.spec import DeepSpeed, JobSpec, NGDOptimizer
from ngd_workers.contract.spec_problems import SpecProblem, SpecProblemsError, explain, parse_spec, shown

__all__ = ["PlanRequest", "plan_of", "read_plan_request", "steps_of"]

NO_CARD = (
    "card is missing: a service without torch can't build the model; `ngd plan JOB --cluster FILE --write-card FILE` "
    "makes its card, also without the data: --shape images:3x224x224:1000"
)


class PlanRequest(Settings):
    """The body of ``POST /api/v1/jobs:plan``."""

    job: dict[str, Any] = Field(description="The job's spec, as it would be posted.")
    cluster: Cluster
    card: ModelCard | None = Field(
        default=None,
        description="The model's card, which `ngd plan --write-card` writes. None: a service that trains jobs on its "
        "own machine makes it.",
    )
    engine: EngineName | None = Field(
        default=None, description="The engine that drives the model; None: the job's own."
    )
    refresh_share: float = Field(
        default=DEFAULT_REFRESH_SHARE,
        gt=0,
        le=1,
        description="Share of all statistics that an adaptive schedule refreshes in a step; a fixed one says its own.",
    )
    measured: Measured | None = Field(
        default=None, description="A short run on one device, by which its rates are set: `ngd plan --measure`."
    )


def read_plan_request(value: object) -> PlanRequest:
    """Returns the request. Types are strict. Raises: SpecProblemsError, which lists every problem."""
    if not isinstance(value, dict):
        detail = f"a request for a plan must be an object of fields, got {shown(value)}; its fields are job and cluster"
        raise SpecProblemsError([SpecProblem("", "wrong_type", detail)])
    try:
        return PlanRequest.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise SpecProblemsError(list(explain(error, PlanRequest))) from error
    except (TypeError, ValueError) as error:
        raise SpecProblemsError([SpecProblem("", "invalid", f"the request is no JSON: {error}; correct it")]) from error


def plan_of(request: PlanRequest) -> Plan:
    """Returns the plan. Raises: SpecProblemsError."""
    spec = parse_spec(request.job)
    if not isinstance(spec, JobSpec):
        detail = "a job with a loop of its own (train) names no model and no batch; the planner can't count its steps"
        raise SpecProblemsError([SpecProblem("/job/train", "own_loop", detail)])
    if request.card is None:
        raise SpecProblemsError([SpecProblem("/card", "missing", NO_CARD)])
    setup = Setup(
        request.card,
        _optimizer_of(spec),
        spec.resources.workers,
        spec.worker_batch,
        spec.micro_batches,
        request.engine or _engine_of(spec),
        request.refresh_share,
    )
    cluster, measured = request.cluster, request.measured
    try:
        if measured is not None:
            cluster = cluster.model_copy(update={"device": calibrated(cluster.device, measured)})
        steps = steps_of(spec, request.card)
        return plan(setup, cluster, steps=steps, is_calibrated=measured is not None)
    except ConfigError as error:
        raise SpecProblemsError([SpecProblem("/job/optimizer", "invalid", str(error))]) from error


def steps_of(spec: JobSpec, card: ModelCard) -> int | None:
    """Returns the job's optimizer steps; None if they follow from a number of samples that is not known."""
    if spec.schedule.steps is not None or spec.schedule.epochs is None:
        return spec.schedule.steps
    if card.samples is None:
        return None
    return spec.schedule.epochs * max(1, card.samples // spec.batch.global_size)


def _engine_of(spec: JobSpec) -> EngineName:
    engine = spec.effective_engine
    if not isinstance(engine, DeepSpeed):
        return engine.kind
    stages: tuple[EngineName, ...] = ("zero0", "zero1", "zero2", "zero3")
    return stages[engine.stage]


def _optimizer_of(spec: JobSpec) -> NGDConfig | FirstOrder:
    choice = spec.optimizer
    if spec.transform is not None:
        detail = (
            f"the planner has no costs of transform {spec.transform.kind}: plan the job without it, or run some steps"
        )
        raise SpecProblemsError([SpecProblem("/job/transform", "invalid", detail)])
    if isinstance(choice, NGDOptimizer):
        known = {name: getattr(choice, name) for name in NGDConfig.model_fields}
        return NGDConfig.model_construct(**known | {"micro_batches": spec.micro_batches})
    if choice.state_per_weight is None:
        detail = (
            f"the planner has no costs of optimizer {choice.kind}: plan the job with ngd, sgd, adamw, lars or lamb, or "
            "run some steps of it"
        )
        raise SpecProblemsError([SpecProblem("/job/optimizer/kind", "invalid", detail)])
    return FirstOrder(choice.kind, choice.state_per_weight)
