"""/healthz, /readyz and /metrics: for the platform, without a key."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.observability import metrics

log = logging.getLogger(__name__)

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers. Says nothing of models: those must not restart a gateway."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 when the database answers and at least one model draws."""
    gateway = gateway_of(request)
    reason = None
    statuses: list[ModelStatus] = []
    try:
        await asyncio.to_thread(gateway.database.jobs.queued_job_ids, "")
        statuses = await gateway.backend.status()
    except (CalotypeError, OSError) as error:
        reason = str(error)
    ready = any(status.ready for status in statuses)
    if not ready and reason is None:
        reason = "No model is ready yet."
    body = {
        "status": "ready" if ready else "loading",
        "reason": reason,
        "models": [
            {
                "name": status.name,
                "ready": status.ready,
                "replicas": status.replicas,
                "queue_seconds": round(status.queue_seconds, 1),
                "adapters": status.adapters,
                "message": status.message,
            }
            for status in statuses
        ],
    }
    headers = {} if ready else {"retry-after": "2"}
    return JSONResponse(body, status_code=200 if ready else 503, headers=headers)


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Prometheus' text format. What cannot be asked right now keeps its last value."""
    gateway = gateway_of(request)
    try:
        metrics.record_jobs(await asyncio.to_thread(gateway.database.jobs.count_jobs))
        metrics.record_promises(await asyncio.to_thread(gateway.database.usage.promises))
        metrics.record_cases(await asyncio.to_thread(gateway.database.cases.count_open_cases))
        statuses = await gateway.backend.status()
        metrics.record_models((s.name, s.replicas, s.queue_seconds) for s in statuses)
    except (CalotypeError, OSError) as error:
        log.warning("some metrics are old: %s", error)
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
