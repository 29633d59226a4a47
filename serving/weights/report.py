"""What a fetch Job leaves behind: one JSON object in the container's termination message."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

from calotype.serving.weights.fetch import Fetched
from calotype.serving.wire.fetch_faults import FetchFailed

TERMINATION_LOG = pathlib.Path("/dev/termination-log")
MAX_BYTES = 4096
"""Kubernetes cuts a longer termination message off, and it would be no JSON any more."""


def success(fetched: Fetched) -> str:
    """The report of weights that are there; the list of layers is shortened to fit."""
    report: dict[str, Any] = {
        "ok": True,
        "resolvedRevision": fetched.revision,
        "sha256": fetched.sha256,
        "sizeBytes": fetched.size_bytes,
        "path": str(fetched.path),
    }
    if fetched.rank is None:
        return _written(report)
    modules = list(fetched.target_modules)
    report |= {"rank": fetched.rank, "targetModules": modules}
    while modules and len(_written(report).encode()) > MAX_BYTES:
        modules.pop()
    return _written(report)


def failure(error: FetchFailed) -> str:
    """The report of a fetch that failed; its sentence is shortened to fit."""
    message = error.message
    report = {"ok": False, "reason": error.code, "message": message}
    while len(_written(report).encode()) > MAX_BYTES:
        message = message[: len(message) * 3 // 4]
        report["message"] = f"{message} ..."
    return _written(report)


def _written(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False)


def leave(report: str, place: pathlib.Path | None) -> None:
    """Writes the report; without a place, where Kubernetes wants it, if this is a container."""
    if place is not None:
        place.write_text(report, encoding="utf-8")
    elif TERMINATION_LOG.exists():
        with contextlib.suppress(OSError):  # it is on the standard output as well
            TERMINATION_LOG.write_text(report, encoding="utf-8")
