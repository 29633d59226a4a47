"""A worker that paints images of one colour instead of drawing, step by step like a real one.

Everything around the engine is real: leases, heartbeats, checkpoints, previews, post-processing.
An image follows from its recipe through every step, so one that was resumed from a checkpoint is
the same only if resuming works.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import GenerationRequest, ImageSize
from calotype.serving.images.encode import encode_image
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.jobs.result import GenerationResult, JobMetrics, TokenUsage
from calotype.serving.storage import new_key
from calotype.serving.worker.given_files import read_given_files
from calotype.serving.worker.lease_source import LeaseSource
from calotype.serving.worker.output_check import Sources, check_output
from calotype.serving.worker.postprocess import Postprocessor

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

_PREVIEW_SIDE = 32


@dataclass(frozen=True, slots=True)
class PainterSettings:
    seconds_per_step: float = 0.0
    """Of each image; 0 = at once."""
    checkpoint_every: int = 0
    """Steps; 0 = never."""
    beat_seconds: float = 0.5
    check_retries: CheckRetries = field(default_factory=CheckRetries)


def begin(request: GenerationRequest) -> list[bytes]:
    """The state of each image before its first step; it follows from all that was asked."""
    states: list[bytes] = []
    for index in range(request.n):
        adapters = [(ref.name, ref.scale) for ref in request.adapters if ref.scale]
        images = (request.image, request.mask, request.references, request.strength)
        after = (request.reference_uses, request.controls)
        words = (request.prompt, request.negative_prompt)
        recipe = (words, request.seed + index, request.sampling, adapters, images, after)
        states.append(hashlib.sha256(repr(recipe).encode()).digest())
    return states


def advance(states: Sequence[bytes]) -> list[bytes]:
    """One step."""
    return [hashlib.sha256(state).digest() for state in states]


def flat(state: bytes, size: ImageSize) -> Pixels:
    """The image of a state: one colour."""
    colour = np.frombuffer(state[:3], np.uint8)
    return np.broadcast_to(colour, (size.height, size.width, 3)).copy()


class Painter:
    """Takes leases one at a time and answers each."""

    def __init__(
        self,
        replica: str,
        leases: LeaseSource,
        safety: SafetyStage,
        blobs: BlobStore,
        settings: PainterSettings | None = None,
    ) -> None:
        self.replica, self.leases = replica, leases
        self.safety, self.blobs = safety, blobs
        self.settings = settings or PainterSettings()
        self.postprocessor = Postprocessor(safety, blobs, self.settings.check_retries)

    async def work(self, wait_seconds: float) -> bool:
        """Waits for a lease and paints it; False when there was none."""
        found = await self.leases.lease(self.replica, 1, wait_seconds)
        for lease in found:
            await _Painting(self, lease).run()
        return bool(found)


class _Painting:
    """One lease of a painter."""

    def __init__(self, painter: Painter, lease: Lease) -> None:
        self._painter, self._settings = painter, painter.settings
        self._leases, self._blobs = painter.leases, painter.blobs
        self._lease, self._request = lease, lease.request
        self._step, self._lost = 0, False

    async def run(self) -> None:
        lease = self._lease
        beating = asyncio.create_task(self._beat())
        try:
            result = await self._paint()
            if result is not None:
                await self._leases.complete(lease.job_id, lease.fence, result)
        except CalotypeError as error:
            await self._leases.fail(lease.job_id, lease.fence, error)
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def _beat(self) -> None:
        lease, steps = self._lease, self._request.sampling.steps
        while True:
            await asyncio.sleep(self._settings.beat_seconds)
            progress = {lease.job_id: LeaseProgress(lease.fence, self._step, steps)}
            try:
                if await self._leases.heartbeat(self._painter.replica, progress):
                    self._lost = True
            except (CalotypeError, OSError):
                continue  # the lease outlives a few lost beats

    async def _paint(self) -> GenerationResult | None:
        started = time.monotonic()
        request, settings = self._request, self._settings
        sources = await Sources.of(request, await read_given_files(self._blobs, request))
        done, states = await self._resume(begin(request))
        for step in range(done + 1, request.sampling.steps + 1):
            if settings.seconds_per_step:
                await asyncio.sleep(settings.seconds_per_step * request.n)
            states, self._step = advance(states), step
            if self._lost:
                return None  # canceled, or another's: nobody wants it
            last = step == request.sampling.steps
            if request.preview_every and step % request.preview_every == 0 and not last:
                await self._preview(step, states, sources)
            if settings.checkpoint_every and step % settings.checkpoint_every == 0 and not last:
                await self._checkpoint(step, states)
        spent = max(0.001 * request.n, time.monotonic() - started)
        painted = [flat(state, request.rendered_size) for state in states]
        final = await self._painter.postprocessor.finalize(self._lease, painted, sources)
        return GenerationResult(
            images=final.images,
            blocked=final.blocked,
            metrics=JobMetrics(gpu_seconds=round(spent, 4)),
            usage=TokenUsage.of(len(request.prompt.split()), [request.size] * request.n),
            decisions=final.decisions,
            prompt_decision=final.prompt,
            held=final.held,
        )

    async def _resume(self, states: list[bytes]) -> tuple[int, list[bytes]]:
        if self._lease.checkpoint is None:
            return 0, states
        try:
            data = await asyncio.to_thread(self._blobs.get, self._lease.checkpoint.blob_key)
        except NotFound:
            return 0, states
        left = json.loads(data)
        return int(left["step"]), [bytes.fromhex(state) for state in left["states"]]

    async def _checkpoint(self, step: int, states: Sequence[bytes]) -> None:
        lease = self._lease
        data = json.dumps({"step": step, "states": [state.hex() for state in states]}).encode()
        key = new_key(lease.team_id, data, "checkpoint")
        await asyncio.to_thread(self._blobs.put, key, data)
        await self._leases.checkpoint(Checkpoint(lease.job_id, lease.fence, step, key))

    async def _preview(self, step: int, states: Sequence[bytes], sources: Sources) -> None:
        safety, retries = self._painter.safety, self._settings.check_retries
        for index, state in enumerate(states):
            pixels = flat(state, ImageSize(_PREVIEW_SIDE, _PREVIEW_SIDE))
            if (await check_output(safety, self._lease, pixels, sources, retries)).blocked:
                continue
            data = encode_image(pixels, "jpeg", 80)
            key = new_key(self._lease.team_id, data, "jpeg")
            await asyncio.to_thread(self._blobs.put, key, data)
            preview = PreviewRecord(
                job_id=self._lease.job_id,
                image_index=index,
                partial_index=step // self._request.preview_every - 1,
                fence=self._lease.fence,
                step=step,
                blob_key=key,
                content_type="image/jpeg",
            )
            await self._leases.preview(preview)
