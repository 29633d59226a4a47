"""What travels between a model app's dispatcher and the gateways' job store, as JSON.

Rows of the job database are plain dataclasses and travel field by field; what has a payload of its
own (`Ending`'s parts) travels as that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from calotype.serving.core.errors import error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.records import AssetRecord, HeldRecord
from calotype.serving.jobs.result import (
    BlockedImage,
    ImageResult,
    JobMetrics,
    JobOutput,
    TokenUsage,
)

PATH = "/internal/v1/store"
"""Of every call: ``POST PATH/NAME`` with the arguments as an object."""
BLOBS_PATH = "/internal/v1/blobs"
"""``GET``, ``PUT`` and ``DELETE`` of ``PATH/KEY``."""

R = TypeVar("R")


def row_payload(row: Any) -> JsonObject:
    """A row as JSON."""
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def row_of(kind: type[R], payload: Mapping[str, object] | None) -> R | None:
    """A row of its JSON; unknown fields are ignored, None stays None."""
    return None if payload is None else kind(**known_fields(kind, dict(payload)))


def ending_payload(ending: Ending) -> JsonObject:
    """An ending as JSON."""
    return {
        "status": ending.status,
        "fence": ending.fence,
        **ending.columns(),
        "stored": [row_payload(row) for row in ending.stored],
        "held": [row_payload(row) for row in ending.held],
    }


def ending_of(payload: JsonObject) -> Ending:
    """An ending of its JSON."""
    found = {name: payload.get(name) for name in ("error", "output", "usage", "metrics")}
    error, output, usage, metrics = found.values()
    moderation = payload.get("moderation")
    return Ending(
        payload["status"],
        fence=payload.get("fence"),
        error=None if error is None else error_from_payload(error),
        output=None if output is None else _output(output),
        moderation=None if moderation is None else ModerationRecord.from_payload(moderation),
        usage=None if usage is None else TokenUsage.from_payload(usage),
        metrics=None if metrics is None else JobMetrics.from_payload(metrics),
        stored=[AssetRecord(**known_fields(AssetRecord, row)) for row in payload["stored"]],
        held=[HeldRecord(**known_fields(HeldRecord, row)) for row in payload["held"]],
    )


def _output(payload: JsonObject) -> JobOutput:
    return JobOutput(
        [ImageResult(**known_fields(ImageResult, image)) for image in payload["images"]],
        [BlockedImage(**known_fields(BlockedImage, image)) for image in payload["blocked"]],
    )
