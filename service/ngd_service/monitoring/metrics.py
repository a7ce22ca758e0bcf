"""What the controller tells Prometheus: counters that its parts raise, and how the jobs stand, read at each scrape."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from ngd_service.job_state import PASSING, Phase
from ngd_service.store.base import JobCounts

__all__ = ["CONTENT_TYPE", "ControllerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RESULTS = ("succeeded", "failed", "cancelled", "lost")
FAILED_FOR_S = 60.0  # a call that failed is made again within this, if anybody still wants it
TICK_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class ControllerMetrics:
    """The service's metrics, in a registry of its own. Every method may be called from any thread."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        build = self._gauge("ngd_build_info", "Always 1; its label says which version runs.", "version")
        build.labels(version).set(1)
        self._ticked_at = time.monotonic()
        age = self._gauge("ngd_reconciler_tick_age_seconds", "Time since the last whole tick of the reconciler.")
        age.set_function(lambda: time.monotonic() - self._ticked_at)
        self._tick = Histogram(
            "ngd_reconciler_tick_seconds",
            "How long a whole tick of the reconciler takes.",
            buckets=TICK_BUCKETS_S,
            registry=self._registry,
        )
        up = self._gauge(
            "ngd_dispatcher_up",
            "1 if the dispatcher carries out its calls, 0 while it does not answer or refuses each submission.",
        )
        self._failed_at: dict[str, float] = {}
        up.set_function(self._dispatcher_up)
        self._started = self._counter("ngd_attempts_started", "Attempts begun by this controller.")
        self._ended = self._counter("ngd_attempts_ended", f"Attempts ended, by result: {', '.join(RESULTS)}.", "result")
        for result in RESULTS:
            self._ended.labels(result)  # from 0 on, so that an increase shows the first one too
        self._ingested = self._counter("ngd_events_ingested", "Events of workers stored for the first time.")
        self._requests = self._counter("ngd_http_requests", "Requests answered.", "method", "route", "status")
        self._request_s = Histogram(
            "ngd_http_request_seconds",
            "Time until the answer began; calls that wait for a job are left out.",
            ["route"],
            registry=self._registry,
        )

    def ticked(self, seconds: float) -> None:
        """The reconciler has come to the end of a tick that took this long."""
        self._ticked_at = time.monotonic()
        self._tick.observe(seconds)

    def dispatcher_answered(self, call: str, *, is_up: bool) -> None:
        """Counts whether the dispatcher's cluster (Ray, Kubernetes) carried out the newest call of this kind."""
        if is_up:
            self._failed_at.pop(call, None)
        else:
            self._failed_at[call] = time.monotonic()

    def attempt_started(self) -> None:
        self._started.inc()

    def attempt_ended(self, result: str) -> None:
        """result: succeeded, failed, cancelled or lost."""
        self._ended.labels(result).inc()

    def events_ingested(self, number: int) -> None:
        self._ingested.inc(number)

    def answered(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """A request has got its answer. route: as the code writes it, with names for ids; seconds: None if it waits."""
        self._requests.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._request_s.labels(route).observe(seconds)

    def exposition(self, job_counts: JobCounts | None) -> bytes:
        """Returns the text that Prometheus reads. job_counts: None leaves out the jobs: no answer of the database."""
        return generate_latest(_Shown(self._registry, job_counts))

    def _dispatcher_up(self) -> float:
        """A kind of call that nobody makes any more says nothing after a while."""
        now = time.monotonic()
        return float(all(now - at > FAILED_FOR_S for at in list(self._failed_at.values())))

    def _gauge(self, name: str, help_: str, *labels: str) -> Gauge:
        return Gauge(name, help_, labels, registry=self._registry)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(name, help_, labels, registry=self._registry)


class _Shown:
    """The registry without the times at which its counters were made, and the jobs that were counted."""

    def __init__(self, registry: CollectorRegistry, job_counts: JobCounts | None) -> None:
        self._registry = registry
        self._job_counts = job_counts

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
        if self._job_counts is not None:
            yield from _jobs(self._job_counts, datetime.now(UTC))


def _jobs(job_counts: JobCounts, now: datetime) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("ngd_jobs", "Jobs in each phase.", labels=["phase"])
    for phase in Phase:
        jobs.add_metric([phase], job_counts.num_in_phase.get(phase, 0))
    yield jobs
    oldest = GaugeMetricFamily("ngd_oldest_queued_seconds", "Age of the oldest job in QUEUED; 0: there is none.")
    oldest.add_metric([], 0.0 if job_counts.oldest_queued_at is None else _age_s(job_counts.oldest_queued_at, now))
    yield oldest
    passing = GaugeMetricFamily(
        "ngd_longest_in_phase_seconds",
        "For how long the job that is longest in this phase has been in it; 0: none is.",
        labels=["phase"],
    )
    for phase in sorted(PASSING):
        since = job_counts.in_phase_since.get(phase)
        passing.add_metric([phase], 0.0 if since is None else _age_s(since, now))
    yield passing
    idle = GaugeMetricFamily(
        "ngd_running_job_idle_seconds", "Time since anything was last heard of a RUNNING job.", labels=["job_id"]
    )
    for job_id, reported_at in job_counts.last_report_at.items():
        idle.add_metric([job_id], _age_s(reported_at, now))
    yield idle


def _age_s(then: datetime, now: datetime) -> float:
    return max(0.0, (now - then).total_seconds())  # a worker's clock may be ahead
