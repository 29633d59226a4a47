"""The seams of the service: small Protocols, each with two real implementations.

| protocol            | on a cluster / the laptop service   | in one process (CLI, tests)       |
|---------------------|-------------------------------------|-----------------------------------|
| `GenerationBackend` | ``cluster.remote_backend``          | ``local.LocalBackend``            |
| `BlobStore`         | ``storage.open_blobs(url)``         | ``testing.MemoryBlobStore``       |
| `SafetyStage`       | ``deployments.moderator`` handle    | ``local.InProcessSafety``         |
| `Clock`             | ``time`` module via `SystemClock`   | ``testing.ManualClock``           |
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from calotype.serving.core.decision import CheckScope, Decision, ImageContext

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


class Clock(Protocol):
    """Where time comes from; seconds."""

    def time(self) -> float:
        """Seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A stored file that is read part by part.

    Close ``parts`` (a generator) when the rest is not wanted.
    """

    size: int
    parts: Generator[bytes]
    """At most `PART_BYTES` each; raises StorageFailed."""


PART_BYTES = 768 * 1024
"""Of a file that is read in parts; a multiple of 3, so that base64 of the parts can be joined."""


class BlobStore(Protocol):
    """Bytes under a key. Written whole or not at all. Raises StorageFailed."""

    def put(self, key: str, data: bytes) -> None: ...

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """`put` for what does not fit into memory: written as it comes, seen when it is whole.

        What ``parts`` raises is raised, and nothing is stored.
        """
        ...

    def get(self, key: str) -> bytes:
        """Raises NotFound when there is no such key."""
        ...

    def open(self, key: str) -> OpenBlob:
        """`get` for what does not fit into memory. Raises NotFound when there is no such key."""
        ...

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""
        ...


class ListedBlobStore(BlobStore, Protocol):
    """A `BlobStore` that can be looked through, for whoever cleans up."""

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """(key, seconds since the epoch of its last `put`) of every blob.

        Args:
            prefix: whole names of folders, such as ``audit/heads/``; "" = everywhere.
        """
        ...


class SafetyStage(Protocol):
    """The safety stage as serving sees it.

    Raises ModerationUnavailable when it cannot decide: fail closed.
    """

    async def check_prompt(self, text: str, scope: CheckScope | None = None) -> Decision: ...

    async def check_image(self, pixels: Pixels, context: ImageContext) -> Decision: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What a backend says of one model."""

    name: str
    ready: bool
    replicas: int = 0
    queue_seconds: float = 0.0
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapter name -> state: ``loading``, ``ready`` or a sentence that says why it failed."""
    message: str = ""
    answers: bool = True
    """Whether its app does; else ``message`` says what is known."""
    away_seconds: float | None = None
    """When an app that does not answer is expected to; None = nobody knows."""


class GenerationBackend(Protocol):
    """What the gateway needs of the machinery behind the job database.

    The job row is durable before `submit` is called: a backend that forgets everything may lose
    time but never a job.
    """

    async def submit(self, job_id: str) -> None:
        """Says that a queued job is in the database. Raises Overloaded when nobody can be told."""
        ...

    async def wait(self, job_id: str, timeout: float) -> None:
        """Returns when the job is over, or after ``timeout`` seconds; the database tells which."""
        ...

    async def cancel(self, job_id: str) -> None:
        """Asks for the job to stop before its next step. Idempotent."""
        ...

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        """Decisions for every text, then for every image.

        Args:
            models: by the policy of one of these; None = of any.
        """
        ...

    async def status(self) -> list[ModelStatus]: ...
