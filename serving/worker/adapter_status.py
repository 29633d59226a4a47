"""How far the adapters of one replica are: what is wanted, what is served, and why not.

An adapter whose new revision cannot be loaded goes on with the old one; both are told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from calotype.serving.core.errors import AdapterLoadFailed, CalotypeError, NotFound, Overloaded
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import GenerationRequest
from calotype.serving.jobs.outage import PART


@dataclass(slots=True)
class AdapterLoad:
    """One adapter in one replica."""

    revision: str
    """The revision that is wanted."""
    asked: float | None = None
    """When the engine was asked for that revision; None before its file is there and proved."""
    state: Literal["loading", "ready", "failed"] = "loading"
    message: str = ""
    serving: str | None = None
    """The revision that requests get; None while there is none."""
    load_milliseconds: int | None = None

    @property
    def text(self) -> str:
        """``loading``, ``ready``, or why it failed."""
        if self.state != "failed":
            return self.state
        if self.serving is None:
            return self.message
        return f"{self.message} The revision before it ({self.serving or 'unnamed'}) is served on."

    def to_payload(self) -> JsonObject:
        """As the status of a model shows it."""
        return {
            "state": self.state,
            "revision": self.revision,
            "servingRevision": self.serving,
            "message": self.text if self.state == "failed" else "",
            "loadMilliseconds": self.load_milliseconds,
        }


class AdapterLoads:
    """Written by `replica.GeneratorReplica`, from what it asks for and what the engine answers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[str, AdapterLoad] = {}
        self._last_end = clock()

    def want(self, name: str, revision: str) -> None:
        """An adapter is asked for; a known revision that did not fail stays as it is."""
        load = self._loads.get(name)
        if load is not None and load.revision == revision and load.state != "failed":
            return
        serving = None if load is None else load.serving
        self._loads[name] = AdapterLoad(revision, serving=serving)

    def asked(self, name: str) -> None:
        """The engine is asked for the wanted revision: what it says is about that one now."""
        load = self._loads.get(name)
        if load is not None and load.asked is None:
            load.asked = self._clock()

    def refuse(self, name: str, message: str) -> None:
        """The engine is not asked for the wanted revision."""
        load = self._loads.get(name)
        if load is not None:
            load.state, load.message = "failed", message

    def keep(self, names: Iterable[str]) -> None:
        """Forgets all others."""
        wanted = set(names)
        self._loads = {name: load for name, load in self._loads.items() if name in wanted}

    def observe(self, states: Mapping[str, str]) -> bool:
        """Takes the engine's ``name -> "loading" | "ready" | sentence``; True while some load."""
        for name, load in self._loads.items():
            text = states.get(name, "loading")
            if load.asked is None or text == "loading":
                continue
            if text != "ready":
                load.state, load.message = "failed", text
            elif load.state != "ready":
                now = self._clock()
                # The engine reads one file after the other: the wait for the others is not ours.
                began = max(load.asked, self._last_end)
                load.state, load.message, load.serving = "ready", "", load.revision
                load.load_milliseconds, self._last_end = round(1000 * (now - began)), now
        return any(load.state == "loading" for load in self._loads.values())

    def texts(self) -> dict[str, str]:
        """Name -> `AdapterLoad.text`."""
        return {name: load.text for name, load in sorted(self._loads.items())}

    def snapshot(self) -> dict[str, AdapterLoad]:
        """Copies, by name."""
        return {name: replace(load) for name, load in sorted(self._loads.items())}


def adapter_fault(
    error: CalotypeError, request: GenerationRequest, state_of: Callable[[str], str | None]
) -> CalotypeError:
    """What an error of the engine means: an adapter that it does not know may be on its way.

    Args:
        state_of: ``loading``, ``ready`` or why not; None where this replica shall not have it.
    """
    if not isinstance(error, NotFound):
        return error
    named = [(adapter.name, "loras") for adapter in request.adapters]
    named += [(control.name, "controlnets") for control in request.controls]
    for name, param in named:
        state = state_of(name)
        if state in ("loading", "ready"):  # the replica is young
            text = f"The adapter {name!r} is not loaded yet."
            return Overloaded(text, details={PART: "adapter"})
        if state is not None:
            return AdapterLoadFailed(state, param=param)
    return error
