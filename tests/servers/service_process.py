"""The processes that Ray started for a service, found by what their command lines say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import psutil


def children(pid: int, holds: Callable[[str], bool]) -> Iterator[psutil.Process]:
    """Every process under `pid` whose command line holds."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if holds(" ".join(process.cmdline())):
                yield process


def replica_of(pid: int, deployment: str) -> psutil.Process | None:
    """The process of a deployment's replica; None while there is none."""

    def holds(title: str) -> bool:
        return title.startswith("ray::ServeReplica") and f":{deployment}" in title

    return next(children(pid, holds), None)
