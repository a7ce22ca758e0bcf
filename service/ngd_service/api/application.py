"""The REST API as an app, without the controller behind it; run as a module, it prints its OpenAPI document."""

import json
import sys
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.types import Lifespan

from ngd_service.api import (
    checkpoints,
    code,
    events,
    health,
    internal,
    jobs,
    logs,
    metrics,
    monitoring,
    planning,
    problems,
)
from ngd_service.api.authentication import AuthenticatedOnly
from ngd_service.api.container import Container
from ngd_service.api.query import known_parameters_only
from ngd_service.api.request_metrics import CountRequests
from ngd_service.api.same_origin import SameOriginOnly
from ngd_service.planning import PlanRequest
from ngd_workers.contract.events import EventBatch
from ngd_workers.contract.spec import JobSpec, LoopSpec

__all__ = ["api_application"]

ROUTERS = (
    jobs.router,
    planning.router,
    code.router,
    events.router,
    metrics.router,
    logs.router,
    checkpoints.router,
    internal.router,
    monitoring.router,
)
API_KEY = {"type": "http", "scheme": "bearer", "description": "An API key, if the service has any (NGD_API_KEYS_DIR)."}
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}


def api_application(lifespan: Lifespan[FastAPI] | None = None, container: Container | None = None) -> FastAPI:
    """Returns the app with its routes, its errors and its guards. container: None to describe the API alone."""
    app = FastAPI(
        title="ngd-dist",
        version=version("ngd-dist"),
        description="Distributed large-batch training with SP-NGD: jobs, their progress and their metrics.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from a CDN; /openapi.json needs none
        redoc_url=None,
        redirect_slashes=False,
        responses=problems.PROBLEM_RESPONSES,
        generate_unique_id_function=lambda route: route.name,
    )
    problems.install(app)
    app.add_middleware(problems.BodyLimit)
    if container is not None:
        app.state.container = container
        _guard(app, container)
    app.add_middleware(problems.RequestId)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(known_parameters_only)])
    app.include_router(health.router)  # a probe's cache buster does not make a service ill
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _guard(app: FastAPI, container: Container) -> None:
    """Adds the middleware that each request passes before its route, the innermost first."""
    settings = container.settings
    app.add_middleware(AuthenticatedOnly, access=container.access)
    app.add_middleware(SameOriginOnly, public_url=settings.public_url, is_loopback=settings.is_loopback)
    app.add_middleware(CountRequests, metrics=container.metrics)


def _describe(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document, with the bodies that routes read by themselves and the problems' media type."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [
                (JobSpec, "validation"),
                (LoopSpec, "validation"),
                (EventBatch, "validation"),
                (PlanRequest, "validation"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        schema["components"]["schemas"] |= bodies["$defs"]
        schema["components"]["securitySchemes"]["ApiKey"] = API_KEY
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path.startswith("/api/") and not path.startswith(internal.INTERNAL_PREFIX):
                    operation["security"] = [{"ApiKey": []}, {}]  # {}: a service without keys asks for none
                operation["responses"]["default"]["content"] = {problems.MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}}
        app.openapi_schema = schema
    return app.openapi_schema


if __name__ == "__main__":
    sys.stdout.write(json.dumps(api_application().openapi(), indent=2) + "\n")
