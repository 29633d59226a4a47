"""A worker that paints flat pictures instead of drawing, step by step like a real one.

Everything around the engine is real: leases, heartbeats, checkpoints, previews, judged pictures,
stamped files. A picture follows from its recipe through every step, so one that was resumed from a
checkpoint is the same only if the hand-over works.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import GenerationRequest, ImageSize
from calotype.serving.images.encode import encode_image
from calotype.serving.jobs.judging import JudgingPolicy, judge_patiently, scope_of
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import (
    CONTENT_TYPES,
    BlockedImage,
    GenerationResult,
    HeldImage,
    ImageResult,
    openai_usage,
)
from calotype.serving.storage import content_key
from calotype.serving.worker.held_image import hold_image

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

_PREVIEW_SIDE = 32


class Leases(Protocol):
    """The generators' side of a dispatcher, hand-over included."""

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]: ...

    async def heartbeat(
        self, replica: str, progress: Mapping[str, Sequence[int]]
    ) -> Sequence[str]: ...

    async def complete(self, job_id: str, fence: int, result: Mapping[str, Any]) -> bool: ...

    async def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool: ...

    async def checkpoint(self, job_id: str, fence: int, step: int, blob_key: str) -> bool: ...

    async def preview(self, job_id: str, fence: int, preview: Mapping[str, Any]) -> bool: ...


@dataclass(frozen=True, slots=True)
class PainterSettings:
    seconds_per_step: float = 0.0
    """Of each picture; 0 = at once."""
    checkpoint_every: int = 0
    """Steps; 0 = never."""
    beat_seconds: float = 0.5
    judging: JudgingPolicy = field(default_factory=JudgingPolicy)


def begin(request: GenerationRequest) -> list[bytes]:
    """The state of each picture before its first step; it follows from all that was asked."""
    states: list[bytes] = []
    for index in range(request.n):
        adapters = [(ref.name, ref.scale) for ref in request.adapters if ref.scale]
        images = (request.image, request.mask, request.references, request.strength)
        words = (request.prompt, request.negative_prompt)
        recipe = (words, request.seed + index, request.sampling, adapters, images)
        states.append(hashlib.sha256(repr(recipe).encode()).digest())
    return states


def advance(states: Sequence[bytes]) -> list[bytes]:
    """One step."""
    return [hashlib.sha256(state).digest() for state in states]


def flat(state: bytes, size: ImageSize) -> Pixels:
    """The picture of a state: one colour."""
    colour = np.frombuffer(state[:3], np.uint8)
    return np.broadcast_to(colour, (size.height, size.width, 3)).copy()


class Painter:
    """Takes leases one at a time and answers for each."""

    def __init__(
        self,
        replica: str,
        leases: Leases,
        safety: SafetyStage,
        blobs: BlobStore,
        settings: PainterSettings | None = None,
    ) -> None:
        self.replica, self._leases = replica, leases
        self._safety, self._blobs = safety, blobs
        self._settings = settings or PainterSettings()
        self._lost: set[str] = set()

    async def work(self, wait_seconds: float) -> bool:
        """Waits for a lease and paints it; False when there was none."""
        found = await self._leases.lease(self.replica, 1, wait_seconds)
        for lease in found:
            await self._paint(lease)
        return bool(found)

    async def _paint(self, lease: Lease) -> None:
        progress = [lease.fence, 0, int(lease.request["steps"])]
        beating = asyncio.create_task(self._beat(lease.job_id, progress))
        try:
            result = await self._finish(lease, progress)
            if result is not None:
                await self._leases.complete(lease.job_id, lease.fence, result.to_payload())
        except CalotypeError as error:
            await self._leases.fail(lease.job_id, lease.fence, error.to_payload())
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def _beat(self, job_id: str, progress: list[int]) -> None:
        while True:
            await asyncio.sleep(self._settings.beat_seconds)
            try:
                if await self._leases.heartbeat(self.replica, {job_id: list(progress)}):
                    self._lost.add(job_id)
            except (CalotypeError, OSError):
                continue  # the lease outlives a few lost beats

    async def _finish(self, lease: Lease, progress: list[int]) -> GenerationResult | None:
        started = time.monotonic()
        request = GenerationRequest.from_payload(lease.request)
        states = begin(request)
        done, states = await self._resume(lease, states)
        for step in range(done + 1, request.sampling.steps + 1):
            if self._settings.seconds_per_step:
                await asyncio.sleep(self._settings.seconds_per_step * request.n)
            states, progress[1] = advance(states), step
            if lease.job_id in self._lost:
                self._lost.discard(lease.job_id)
                return None  # canceled, or another's: nobody wants it
            last = step == request.sampling.steps
            if request.preview_every and step % request.preview_every == 0 and not last:
                await self._preview(lease, request, step, states)
            every = self._settings.checkpoint_every
            if every and step % every == 0 and not last:
                await self._checkpoint(lease, step, states)
        spent = max(0.001 * request.n, time.monotonic() - started)
        return await self._result(lease, request, states, spent)

    async def _resume(self, lease: Lease, states: list[bytes]) -> tuple[int, list[bytes]]:
        if lease.checkpoint is None:
            return 0, states
        try:
            left = json.loads(
                await asyncio.to_thread(self._blobs.get, lease.checkpoint["blob_key"])
            )
        except NotFound:
            return 0, states
        return int(left["step"]), [bytes.fromhex(state) for state in left["states"]]

    async def _checkpoint(self, lease: Lease, step: int, states: Sequence[bytes]) -> None:
        data = json.dumps({"step": step, "states": [state.hex() for state in states]}).encode()
        key = content_key(lease.team_id, data + lease.job_id.encode(), "checkpoint")
        await asyncio.to_thread(self._blobs.put, key, data)
        await self._leases.checkpoint(lease.job_id, lease.fence, step, key)

    async def _preview(
        self, lease: Lease, request: GenerationRequest, step: int, states: Sequence[bytes]
    ) -> None:
        for index, state in enumerate(states):
            pixels = flat(state, ImageSize(_PREVIEW_SIDE, _PREVIEW_SIDE))
            if (await self._judged(pixels, scope_of(lease.input)))["blocked"]:
                continue
            data = encode_image(pixels, "jpeg", 80)
            key = content_key(lease.team_id, data, "jpeg")
            await asyncio.to_thread(self._blobs.put, key, data)
            preview = {
                "image_index": index,
                "partial_index": step // request.preview_every - 1,
                "step": step,
                "blob_key": key,
                "content_type": "image/jpeg",
            }
            await self._leases.preview(lease.job_id, lease.fence, preview)

    async def _result(
        self, lease: Lease, request: GenerationRequest, states: Sequence[bytes], spent: float
    ) -> GenerationResult:
        pictures = [flat(state, request.size) for state in states]
        scope = scope_of(lease.input)
        decisions = [await self._judged(pixels, scope) for pixels in pictures]
        images: list[ImageResult] = []
        blocked: list[BlockedImage] = []
        held: list[HeldImage] = []
        for index, (pixels, judged) in enumerate(zip(pictures, decisions, strict=True)):
            if judged["verdict"] == "REVIEW" or (lease.hold is not None and not judged["blocked"]):
                data = encode_image(pixels, lease.input["output_format"], None)
                held.append(
                    await hold_image(
                        self._blobs, lease, request, index, data, judged, lease.hold or ()
                    )
                )
            elif judged["blocked"]:
                blocked.append(
                    BlockedImage(index, judged["categories"], judged["id"], judged["policy"])
                )
            else:
                images.append(await self._store(lease, request, index, pixels, judged))
        tokens = len(request.prompt.split())
        return GenerationResult(
            images=images,
            blocked=blocked,
            metrics={"gpu_seconds": round(spent, 4)},
            usage=openai_usage(tokens, [request.size] * request.n),
            decisions=decisions,
            held=held,
        )

    async def _judged(self, pixels: Pixels, scope: Mapping[str, Any] | None) -> dict[str, Any]:
        judge = partial(self._safety.check_image, pixels, scope=scope)
        return await judge_patiently(judge, self._settings.judging, asyncio.sleep)

    async def _store(
        self,
        lease: Lease,
        request: GenerationRequest,
        index: int,
        pixels: Pixels,
        judged: dict[str, Any],
    ) -> ImageResult:
        kind = lease.input["output_format"]
        compression = lease.input["output_compression"]
        data = encode_image(pixels, kind, compression, recipe=lease.stamp_for(index))
        key = content_key(lease.team_id, data, kind)
        # Never deleted here: another job's picture may be the same. What no row names is swept.
        await asyncio.to_thread(self._blobs.put, key, data)
        return ImageResult(
            asset_id=new_id("asset"),
            blob_key=key,
            index=index,
            seed=request.seed + index,
            width=request.size.width,
            height=request.size.height,
            content_type=CONTENT_TYPES[kind],
            sha256=hashlib.sha256(data).hexdigest(),
            flagged=judged["flagged"],
        )
