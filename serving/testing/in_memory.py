"""Second implementations of the protocols: in memory, scripted, without a GPU.

For tests, and for people who develop clients: `PaintingBackend` answers at once with flat images
through the same dispatcher, store and safety seam as the real service.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import (
    PART_BYTES,
    BlobStore,
    Clock,
    ModelStatus,
    OpenBlob,
    SafetyStage,
    SystemClock,
)
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.result import GenerationResult, ImageResult, JobMetrics, TokenUsage
from calotype.serving.storage import check_key
from calotype.serving.testing.painter import Painter, PainterSettings

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


class ManualClock:
    """A `Clock` that stands still until it is told otherwise."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._elapsed = 0.0

    def time(self) -> float:
        return self._now + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds


class MemoryBlobStore:
    """A `BlobStore` in a dict."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.blobs: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}
        self.failure: CalotypeError | None = None
        """When set, `put` raises it: a full disk on demand."""

    def put(self, key: str, data: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.blobs[check_key(key)] = bytes(data)
        self._modified[key] = self.clock.time()

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        self.put(key, b"".join(parts))

    def open(self, key: str) -> OpenBlob:
        data = self.get(key)
        starts = range(0, len(data), PART_BYTES)
        return OpenBlob(len(data), (data[start : start + PART_BYTES] for start in starts))

    def get(self, key: str) -> bytes:
        try:
            return self.blobs[check_key(key)]
        except KeyError:
            raise NotFound(f"There is no stored file {key!r}.") from None

    def delete(self, key: str) -> None:
        self.blobs.pop(check_key(key), None)
        self._modified.pop(key, None)

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        yield from [item for item in self._modified.items() if item[0].startswith(prefix)]


def decision(
    stage: str = "input",
    *,
    blocked: Iterable[str] = (),
    flagged: Iterable[str] = (),
    unavailable: bool = False,
) -> JsonObject:
    """A decision as `moderation.decision.Decision.to_payload` writes it."""
    refused, noticed = list(blocked), [*blocked, *flagged]
    verdict = "ERROR" if unavailable else "BLOCK" if refused else "FLAG" if noticed else "ALLOW"
    digest = hashlib.sha256(f"{stage}{refused}{noticed}".encode()).hexdigest()
    return {
        "id": f"dec_{digest[:24]}",
        "stage": stage,
        "policy": "scripted@1",
        "verdict": verdict,
        "served": verdict in ("ALLOW", "FLAG"),
        "blocked": verdict not in ("ALLOW", "FLAG"),
        "flagged": verdict != "ALLOW",
        "unavailable": unavailable,
        "categories": refused,
        "flagged_categories": noticed,
        "scores": dict.fromkeys(noticed, 0.99),
        "findings": [],
    }


class ScriptedSafety:
    """A `SafetyStage` that does what two functions say; they return a payload or raise."""

    def __init__(
        self,
        prompt: Callable[[str], JsonObject] = lambda text: decision("input"),
        image: Callable[[Pixels], JsonObject] = lambda pixels: decision("output"),
    ) -> None:
        self.prompt, self.image = prompt, image
        self.scopes: list[CheckScope | None] = []
        """For whom it was asked, in order."""
        self.contexts: list[ImageContext] = []
        """What images were checked with, in order."""

    async def check_prompt(self, text: str, scope: CheckScope | None = None) -> Decision:
        self.scopes.append(scope)
        return Decision.from_payload(self.prompt(text))

    async def check_image(self, pixels: Pixels, context: ImageContext) -> Decision:
        self.scopes.append(context.scope)
        self.contexts.append(context)
        return Decision.from_payload(self.image(pixels))


def drawn_result(lease: Lease, gpu_seconds: float = 0.5) -> GenerationResult:
    """As of a worker that drew one image for ``lease``; no such image is stored."""
    size = lease.request.size
    image = ImageResult(
        asset_id=f"asset_{lease.job_id}_{lease.fence}",
        blob_key=f"{lease.job_id}.png",
        index=0,
        seed=lease.request.seed,
        width=size.width,
        height=size.height,
        content_type="image/png",
        sha256="0" * 64,
    )
    return GenerationResult(
        [image], metrics=JobMetrics(gpu_seconds=gpu_seconds), usage=TokenUsage.of(3, [size])
    )


class PaintingBackend:
    """A `GenerationBackend` in this process, with one worker that paints instead of drawing.

    Use it as the application's lifespan: ``create_app(..., backend, ..., backend.lifespan)``.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        safety: SafetyStage | None = None,
        models: Sequence[str] = ("shapes",),
        clock: Clock | None = None,
        policy: DispatchPolicy | None = None,
        settings: PainterSettings | None = None,
    ) -> None:
        self.safety: SafetyStage = safety or ScriptedSafety()
        # Of all models, but its forecast is told as the first one's.
        self.dispatcher = Dispatcher(
            database, self.safety, clock or SystemClock(), policy, forecast_as=models[0]
        )
        retries = (policy or DispatchPolicy()).check_retries
        self.painter = Painter(
            "painter",
            self.dispatcher,
            self.safety,
            blobs,
            replace(settings or PainterSettings(), check_retries=retries),
        )
        self._models = list(models)
        self._may_paint = threading.Event()
        self._may_paint.set()
        self._resting = threading.Event()
        self._resting.set()

    def pause(self) -> None:
        """Leaves jobs in the queue until `resume`; called from another thread than the painter's.

        Returns once the painter rests: it may have been waiting for a lease just now.
        """
        self._may_paint.clear()
        self._resting.wait(10)

    def resume(self) -> None:
        self._may_paint.set()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        await self.dispatcher.start()
        worker = asyncio.create_task(self._paint_forever())
        try:
            yield
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
            await self.dispatcher.stop()

    async def submit(self, job_id: str) -> None:
        await self.dispatcher.submit(job_id)

    async def wait(self, job_id: str, timeout: float) -> None:
        await self.dispatcher.wait(job_id, timeout)

    async def cancel(self, job_id: str) -> None:
        await self.dispatcher.cancel(job_id)

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        found = [await self.safety.check_prompt(text, scope) for text in texts]
        context = ImageContext.of_upload(scope)
        return found + [await self.safety.check_image(image, context) for image in images]

    async def status(self) -> list[ModelStatus]:
        backlog = self.dispatcher.backlog_seconds()
        return [ModelStatus(name, True, 1, backlog) for name in self._models]

    async def _paint_forever(self) -> None:
        while True:
            if not self._may_paint.is_set():
                self._resting.set()
                await asyncio.sleep(0.01)
                continue
            self._resting.clear()
            try:
                await self.painter.work(0.05)
            except CalotypeError:
                # A busy database: the lease runs out or is asked for again.
                await asyncio.sleep(0.05)
