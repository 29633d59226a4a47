"""``spec.fallback`` of an ImageModel: which other model draws while this one cannot in time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.serving.api.state.catalog import may_use
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.config import ImageModel
from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.jobs.records import TeamRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FallbackModel:
    model: ImageModel
    warning: str
    """For the answer: who drew, and why."""


async def find_fallback(
    gateway: Gateway, model: ImageModel, team: TeamRecord | None
) -> FallbackModel | None:
    """The model that takes a request for ``model``; None where that one draws it itself.

    A fallback that is no better off hands on to its own. The team must be allowed the other model.
    """
    if model.spec.fallback is None:
        return None
    try:
        statuses = {status.name: status for status in await gateway.backend.status()}
    except (CalotypeError, OSError) as error:
        log.warning("%s: no fallback is looked for, nobody says who is well: %s", model.name, error)
        return None
    reason = await _unavailable_reason(gateway, model, statuses)
    if reason is None:
        return None
    passed, other = {model.name}, model
    while other.spec.fallback is not None:
        name = other.spec.fallback.model_ref.name
        if name in passed:
            return None
        passed.add(name)
        try:
            other = gateway.catalog.model(name)
        except NotFound:
            return None
        open_to_it = may_use(other.name, team)
        if open_to_it and await _unavailable_reason(gateway, other, statuses) is None:
            return FallbackModel(
                other, f"{other.name} draws instead of {model.name}, which {reason}."
            )
    return None


async def _unavailable_reason(
    gateway: Gateway, model: ImageModel, statuses: Mapping[str, ModelStatus]
) -> str | None:
    """Why a model does not draw in time, as the end of a sentence; None when it does."""
    status = statuses.get(model.name)
    if status is None or not status.ready:
        return "is not ready"
    if model.spec.fallback is None:
        return None
    most = model.spec.fallback.when.queue_seconds_above
    wait = (await gateway.estimates.forecast(model.name)).backlog_seconds
    if wait <= most:
        return None
    return f"has work for {wait:.0f} s (its limit is {most:g} s)"
