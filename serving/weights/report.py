"""Reports a fetch to the operator: a `wire.fetch_result` in the container's termination message."""

from __future__ import annotations

import contextlib
import pathlib

from calotype.serving.weights.fetch import Fetched
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_result import FetchedWeights, FetchRefused, render

TERMINATION_LOG = pathlib.Path("/dev/termination-log")


def success(fetched: Fetched) -> str:
    """The report of weights that are there; the list of layers is shortened to fit."""
    return render(
        FetchedWeights(
            revision=fetched.revision,
            sha256=fetched.sha256,
            size_bytes=fetched.size_bytes,
            path=str(fetched.path),
            rank=fetched.rank,
            target_modules=fetched.target_modules,
        )
    )


def failure(error: FetchFailed) -> str:
    """The report of a fetch that failed; its sentence is shortened to fit."""
    return render(FetchRefused(reason=error.code, message=error.message))


def leave(report: str, place: pathlib.Path | None) -> None:
    """Writes the report; without a place, where Kubernetes wants it, if this is a container."""
    if place is not None:
        place.write_text(report, encoding="utf-8")
    elif TERMINATION_LOG.exists():
        with contextlib.suppress(OSError):  # it is on the standard output as well
            TERMINATION_LOG.write_text(report, encoding="utf-8")
