"""The parameters of the list of jobs."""

from collections.abc import Iterable
from typing import Annotated, get_args

from fastapi import Depends, Query

from ngd_service.errors import InvalidParameterError
from ngd_service.job_state import Phase
from ngd_service.resources import ProblemItem
from ngd_service.store.base import JobQuery, Order
from ngd_workers.contract.spec_problems import did_you_mean

__all__ = ["Wanted", "job_query"]

ORDERS = get_args(Order)
Text = Annotated[str, Query(pattern=r"^[^\x00]*$", max_length=100)]
Texts = list[Text] | None


def job_query(
    phase: Annotated[list[str] | None, Query(description="Only jobs in this phase; may be repeated.")] = None,
    q: Annotated[Text, Query(description="Only jobs with this in their name or id.")] = "",
    optimizer: Annotated[Texts, Query(description="Only jobs of this optimizer; may be repeated.")] = None,
    owner: Annotated[Texts, Query(description="Only jobs of this holder of a key; may be repeated.")] = None,
    label: Annotated[
        Texts, Query(description="name=value, or a name alone for any value: only jobs with all of these labels.")
    ] = None,
    order_by: Annotated[
        str,
        Query(
            description=f"One of {', '.join(ORDERS)}; with a - before it the other way. state: jobs that run, jobs "
            "that wait, the next one first, then those that have ended."
        ),
    ] = "-created",
) -> JobQuery:
    """Returns the query. Raises: InvalidParameterError."""
    order = next((one for one in ORDERS if one == order_by.removeprefix("-")), None)
    if order is None:
        raise _invalid("order_by", order_by, ORDERS)
    return JobQuery(
        phases=sorted({_phase(name) for name in phase or ()}),
        text=q.strip(),
        optimizers=sorted(set(optimizer or ())),
        owners=sorted(set(owner or ())),
        labels=sorted({_label(text) for text in label or ()}, key=str),
        order=order,
        is_descending=order_by.startswith("-"),
    )


Wanted = Annotated[JobQuery, Depends(job_query)]


def _phase(name: str) -> Phase:
    try:
        return Phase(name.upper())
    except ValueError:
        raise _invalid("phase", name, Phase) from None


def _label(text: str) -> tuple[str, str | None]:
    name, has_value, value = text.partition("=")
    return name, value if has_value else None


def _invalid(parameter: str, given: str, choices: Iterable[str]) -> InvalidParameterError:
    detail = f"{parameter} must be one of {', '.join(choices)}, got {given!r}"
    hint = did_you_mean(given.upper() if parameter == "phase" else given, choices)
    return InvalidParameterError(
        detail, [ProblemItem(pointer=parameter, code="invalid_choice", detail=detail, hint=hint)]
    )
