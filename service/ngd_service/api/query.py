"""Refuses a parameter that a route does not have: ignored, a misspelt validate_only would create the job."""

from fastapi import Request
from fastapi.routing import APIRoute

from ngd_service.errors import InvalidParameterError
from ngd_service.resources import ProblemItem
from ngd_workers.contract.spec_problems import MAX_PROBLEMS, cut, did_you_mean, quoted

__all__ = ["known_parameters_only"]


async def known_parameters_only(request: Request) -> None:
    """Raises: InvalidParameterError that lists each unknown name."""
    route = request.scope["route"]
    parts = (route.dependant, *route.dependant.dependencies) if isinstance(route, APIRoute) else ()
    known = {field.alias for part in parts for field in part.query_params}
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        items = [_item(request, name, known) for name in list(dict.fromkeys(unknown))[:MAX_PROBLEMS]]
        raise InvalidParameterError("; ".join(item.detail for item in items), items)


def _item(request: Request, name: str, known: set[str]) -> ProblemItem:
    detail = f"{request.method} {request.url.path} has no parameter {quoted(name)}"
    choices = f"its parameters are {', '.join(sorted(known))}" if known else "it has none"
    return ProblemItem(
        pointer=cut(name), code="unknown_parameter", detail=detail, hint=did_you_mean(name, known) or choices
    )
