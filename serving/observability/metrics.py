"""The Prometheus metrics of the gateway, all named ``calotype_*``.

Labels are bounded: routes are templates, models are names from manifests, never anything that a
client or a team wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REGISTRY = CollectorRegistry()

HTTP_REQUESTS = Counter(
    "calotype_http_requests",
    "Answers of the gateway.",
    ["route", "method", "status"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "calotype_http_request_seconds",
    "Time from a request's headers to the end of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
    registry=REGISTRY,
)
JOBS = Gauge(
    "calotype_jobs", "Jobs in the database, by state.", ["model", "status"], registry=REGISTRY
)
WAITING = Gauge(
    "calotype_jobs_waiting",
    "Queued jobs that wait for a part which is away.",
    ["model", "part"],
    registry=REGISTRY,
)
QUEUE_SECONDS = Gauge(
    "calotype_queue_seconds", "Predicted wait for a new job.", ["model"], registry=REGISTRY
)
REPLICAS = Gauge(
    "calotype_replicas", "Generator replicas that are ready.", ["model"], registry=REGISTRY
)
IMAGES = Counter(
    "calotype_images", "Pictures handed to clients that waited.", ["model"], registry=REGISTRY
)
GPU_SECONDS = Counter(
    "calotype_gpu_seconds",
    "Measured device time of these pictures, of all devices.",
    ["model"],
    registry=REGISTRY,
)
PASSES_SKIPPED = Counter(
    "calotype_passes_skipped",
    "Denoiser passes of these pictures that a step cache left out.",
    ["model"],
    registry=REGISTRY,
)
BLOCKED = Counter(
    "calotype_moderation_blocked",
    "Requests (input) and pictures (output) that the safety stage refused.",
    ["model", "stage"],
    registry=REGISTRY,
)
ATTACHED = Counter(
    "calotype_idempotent_replays",
    "Requests that joined a job instead of making one.",
    ["source"],
    registry=REGISTRY,
)
WEBHOOKS = Counter(
    "calotype_webhook_deliveries",
    "Attempts to tell a receiver of an event.",
    ["type", "result"],
    registry=REGISTRY,
)
LIMITED = Counter(
    "calotype_rate_limited",
    "Requests refused by a limit: rate, open jobs, quota, queue, deadline.",
    ["reason"],
    registry=REGISTRY,
)
STREAMS = Gauge("calotype_event_streams", "Event streams that are open.", registry=REGISTRY)
PROMISES = Gauge(
    "calotype_promises",
    "Jobs that were over when it was promised (kept), and later (broken).",
    ["model", "result"],
    registry=REGISTRY,
)
SWEPT = Counter(
    "calotype_swept",
    "Expired things that the sweeper removed.",
    ["kind"],
    registry=REGISTRY,
)
LOOP_FAULTS = Counter(
    "calotype_loop_faults",
    "Rounds of background work that failed and are tried again.",
    ["loop", "kind"],
    registry=REGISTRY,
)
SET_ASIDE = Counter(
    "calotype_set_aside",
    "Rows that failed again and again and are not tried any more.",
    ["kind"],
    registry=REGISTRY,
)
BATCH_LINES = Counter(
    "calotype_batch_lines", "Lines of batches that are over.", ["result"], registry=REGISTRY
)


CASES = Gauge(
    "calotype_moderation_cases",
    "Appeals, reports and held pictures that wait for a person.",
    ["kind"],
    registry=REGISTRY,
)


def record_cases(waiting: Mapping[str, int]) -> None:
    """Sets `CASES` from the database."""
    for kind, count in waiting.items():
        CASES.labels(kind).set(count)


def record_promises(counts: Iterable[tuple[str, int, int]]) -> None:
    """Sets `PROMISES` of (model, kept, broken)."""
    for model, kept, broken in counts:
        PROMISES.labels(model, "kept").set(kept)
        PROMISES.labels(model, "broken").set(broken)


def record_jobs(counts: Mapping[tuple[str, str], int]) -> None:
    """Sets `JOBS` from the database; states that vanished become 0."""
    JOBS.clear()
    for (model, status), count in counts.items():
        JOBS.labels(model, status).set(count)


def record_waiting(counts: Mapping[tuple[str, str], int]) -> None:
    """Sets `WAITING` from the database; parts that are back become 0."""
    WAITING.clear()
    for (model, part), count in counts.items():
        WAITING.labels(model, part).set(count)


def record_models(figures: Iterable[tuple[str, int, float]]) -> None:
    """Sets the gauges of (model, replicas, queue seconds)."""
    for model, replicas, queue_seconds in figures:
        REPLICAS.labels(model).set(replicas)
        QUEUE_SECONDS.labels(model).set(queue_seconds)


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
