"""/healthz, /readyz and /metrics: for the platform, without a key."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.routes.models import status_object
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.observability import metrics

log = logging.getLogger(__name__)

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    """503 when only a restart helps: work between requests hangs, or fails again and again.

    Says nothing of models and of the database: those must not restart a gateway.
    """
    loops = gateway_of(request).loops.states()
    stuck = sorted(name for name, state in loops.items() if state == "stuck")
    body = {"status": "stuck" if stuck else "ok", "loops": loops}
    return JSONResponse(body, status_code=503 if stuck else 200)


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 when the database answers and a model is ready.

    A gateway that outlives its models needs none: it keeps jobs until their model is back.
    """
    gateway = gateway_of(request)
    reason = None
    statuses: list[ModelStatus] = []
    try:
        await asyncio.to_thread(gateway.database.jobs.queued_job_ids, "")
        statuses = await gateway.backend.status()
    except (CalotypeError, OSError) as error:
        reason = str(error)
    if gateway.outlives_models:
        waiting = "unavailable"
    else:
        waiting = "loading"
        if reason is None and not any(status.ready for status in statuses):
            reason = "No model is ready yet."
    body = {
        "status": "ready" if reason is None else waiting,
        "reason": reason,
        "models": [status_object(status) for status in statuses],
    }
    away = min((s.away_seconds for s in statuses if s.away_seconds is not None), default=2.0)
    headers = {} if reason is None else {"retry-after": f"{max(2.0, away):.0f}"}
    return JSONResponse(body, status_code=200 if reason is None else 503, headers=headers)


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Prometheus' text format. What cannot be asked right now keeps its last value."""
    gateway = gateway_of(request)
    try:
        metrics.record_jobs(await asyncio.to_thread(gateway.database.jobs.count_jobs))
        metrics.record_waiting(await asyncio.to_thread(gateway.database.jobs.count_waiting))
        metrics.record_promises(await asyncio.to_thread(gateway.database.usage.promises))
        metrics.record_cases(await asyncio.to_thread(gateway.database.cases.count_open_cases))
        statuses = await gateway.backend.status()
        metrics.record_models((s.name, s.replicas, s.queue_seconds) for s in statuses)
    except (CalotypeError, OSError) as error:
        log.warning("some metrics are old: %s", error)
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
