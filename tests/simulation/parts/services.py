"""The parts of the service that compute, in their simplest form: engine, text encoder, moderator.

What talks to them is production code; they do at once what the real ones need a device for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.parts.pictures import digest_of, drawn

from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.core.errors import Cancelled
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import (
    Checkpoint,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Preview,
    Progress,
)
from calotype.serving.testing.in_memory import decision
from calotype.serving.worker.engine_thread import EngineInputs

REVIEW = "hold it"
"""In a prompt: its pictures wait for a reviewer."""
REFUSED = "refuse it"
BLURRED = "blur it"
BLOCKED_WITH_REFERENCES = "known face"
"""In a prompt: its pictures are refused if they were drawn from a reference."""


@dataclass
class Ledger:
    """What was really done, told by those who did it."""

    worked: dict[str, float] = field(default_factory=dict)
    """Device seconds by job."""
    checked: dict[str, list[tuple[str, tuple[str, ...], str]]] = field(default_factory=dict)
    """Digest of pixels -> (prompt, digests of references, verdict) of each time."""
    sources: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """Digest of drawn pixels -> (prompt, digests of references) they were drawn from."""
    blurs: dict[str, str] = field(default_factory=dict)
    """Digest of blurred pixels -> of what they were."""


class SimulatedEngine:
    """In place of `worker.engine_thread.EngineThread` and the engine in it.

    Args:
        step_seconds: of each denoise step.
    """

    devices = 1

    def __init__(self, ledger: Ledger, step_seconds: float) -> None:
        self._ledger, self._step_seconds = ledger, step_seconds
        self.alive = True
        self._wanted: set[str] = set()
        self._aborted: set[str] = set()

    @property
    def engine(self) -> SimulatedEngine:
        return self

    def prompts_of(self, request: GenerationRequest) -> tuple[str, ...]:
        return (request.prompt,)

    def checkpoint(self, request_id: str) -> None:
        self._wanted.add(request_id)

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def draw(
        self, request: GenerationRequest, given: EngineInputs
    ) -> AsyncGenerator[Event, None]:
        self._aborted.discard(request.id)
        done, seconds = 0, 0.0
        if given.checkpoint is not None:
            left = json.loads(given.checkpoint)
            done, seconds = int(left["step"]), float(left["seconds"])
        steps = request.sampling.steps
        for step in range(done + 1, steps + 1):
            await asyncio.sleep(self._step_seconds)
            if request.id in self._aborted:
                yield Failed(request.id, Cancelled("The job was canceled."))
                return
            seconds += self._step_seconds
            worked = self._ledger.worked.get(request.id, 0.0)
            self._ledger.worked[request.id] = worked + self._step_seconds
            yield Progress(request.id, step, steps, seconds=seconds)
            if step == steps:
                break
            if request.id in self._wanted:
                self._wanted.discard(request.id)
                data = json.dumps({"step": step, "seconds": seconds}).encode()
                yield Checkpoint(request.id, step, data)
            if request.preview_every and step % request.preview_every == 0:
                for index in range(request.n):
                    yield Preview(request.id, index, step, self._image(request, given, index, step))
        images = tuple(self._image(request, given, index, steps) for index in range(request.n))
        yield Finished(request.id, images, seconds)

    def _image(self, request: GenerationRequest, given: EngineInputs, index: int, step: int) -> Any:
        references = tuple(digest_of(drawn("given", data)) for data in given.files.values())
        found = drawn(request.prompt, references, request.seed + index, step)
        self._ledger.sources[digest_of(found)] = (request.prompt, references)
        return found


class TextEncoderServer:
    async def encode(self, prompt: str) -> tuple[Any, int, bool]:
        return prompt, len(prompt.split()), False


class ModeratorServer:
    """Checks by words of the prompt.

    Args:
        taken_down: digests of pictures that were taken down.
    """

    def __init__(self, ledger: Ledger, taken_down: Callable[[], frozenset[str]]) -> None:
        self._ledger, self._taken_down = ledger, taken_down

    async def check_prompt(self, text: str, scope: JsonObject | None) -> JsonObject:
        CheckScope.from_payload(scope)
        return _decided("input", "BLOCK" if REFUSED in text else "ALLOW")

    async def check_image(
        self, pixels: Any, prompt: str, references: list[Any], scope: JsonObject | None
    ) -> JsonObject:
        context = ImageContext(prompt, references, CheckScope.from_payload(scope))
        digest = digest_of(pixels)
        verdict = "ALLOW"
        if digest in await asyncio.to_thread(self._taken_down):
            verdict = "BLOCK"
        elif BLOCKED_WITH_REFERENCES in prompt and context.references:
            verdict = "BLOCK"
        elif REVIEW in prompt:
            verdict = "REVIEW"
        elif BLURRED in prompt:
            verdict = "BLUR"
        found = tuple(digest_of(reference) for reference in context.references)
        self._ledger.checked.setdefault(digest, []).append((prompt, found, verdict))
        return _decided("output", verdict)


def _decided(stage: str, verdict: str) -> JsonObject:
    found = decision(stage, blocked=[] if verdict == "ALLOW" else ["violence"])
    digest = hashlib.sha256(f"{stage}{verdict}".encode()).hexdigest()
    found |= {"id": f"dec_{digest[:24]}", "verdict": verdict, "blocked": verdict != "ALLOW"}
    return Decision.from_payload(found).to_payload()
