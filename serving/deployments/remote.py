"""Calls between deployments that outlive the death of a replica.

Serve restarts a replica that was killed within seconds; a call that failed because its replica died
is made again for about that long. Every call made this way is idempotent or fenced. Errors of our
own tree come out as they were raised on the other side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc.aio
import ray.exceptions
from ray.serve.exceptions import RayServeException

from calotype.moderation.policy.text_time import text_seconds
from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.core.errors import (
    CalotypeError,
    EngineError,
    ModerationUnavailable,
    Overloaded,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.jobs.result import GenerationResult
from calotype.serving.worker.prompt_source import EncodedPrompt

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from calotype.serving.core.request import Pixels

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 40.0
"""How long a dead replica is waited for; a new one with torch in it takes up to 20 s."""
HEARTBEAT_SECONDS = 3.0
"""A heartbeat that takes longer is given up: the next ones must come before the lease runs out."""
LOST = (
    # A replica, a node or an answer is gone: all that Ray reports but what the other side raised.
    ray.exceptions.RayError,
    RayServeException,
    grpc.aio.AioRpcError,
)


async def call(
    make: Callable[[], Any], what: str, patience: float = PATIENCE_SECONDS, limit: float = 60.0
) -> Any:
    """The answer of ``make()``, a call on a deployment handle.

    Args:
        what: names the other side in messages.
        patience: seconds for which a lost replica is waited for.
        limit: seconds that one attempt may take.

    Raises:
        Overloaded: the other side did not come back in time.
        CalotypeError: what the other side raised.
    """
    give_up = time.monotonic() + patience
    pause = 0.2
    while True:
        try:
            async with asyncio.timeout(limit):
                return await make()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CalotypeError):
                raise cause from None
            raise EngineError(f"{what} failed: {type(cause).__name__}: {cause}.") from error
        except (*LOST, TimeoutError) as error:
            if time.monotonic() + pause > give_up:
                raise Overloaded(
                    f"{what} cannot be reached at the moment. Try again in a few seconds.",
                    retry_after=5,
                ) from error
            log.warning("%s: %s; trying again", what, type(error).__name__)
        await asyncio.sleep(pause)
        pause = min(2.0, pause * 1.6)


class RemoteLeases:
    """`worker.lease_source.LeaseSource` over the dispatcher's handle; payloads go over it."""

    def __init__(self, dispatcher: DeploymentHandle) -> None:
        self._dispatcher = dispatcher

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]:
        found = await call(
            lambda: self._dispatcher.lease.remote(replica, limit, wait_seconds),
            "The dispatcher",
            limit=wait_seconds + 20,
        )
        return [Lease.from_payload(payload) for payload in found]

    async def heartbeat(self, replica: str, progress: Mapping[str, LeaseProgress]) -> Sequence[str]:
        payload = {job_id: reached.to_payload() for job_id, reached in progress.items()}
        lost: Sequence[str] = await call(
            lambda: self._dispatcher.heartbeat.remote(replica, payload),
            "The dispatcher",
            patience=0,
            limit=HEARTBEAT_SECONDS,
        )
        return lost

    async def complete(self, job_id: str, fence: int, result: GenerationResult) -> bool:
        return bool(await self._tell("complete", job_id, fence, result.to_payload()))

    async def fail(self, job_id: str, fence: int, error: CalotypeError) -> bool:
        return bool(await self._tell("fail", job_id, fence, error.to_payload()))

    async def release(self, job_id: str, fence: int) -> bool:
        return bool(await self._tell("release", job_id, fence))

    async def drop_checkpoint(self, job_id: str, fence: int) -> bool:
        return bool(await self._tell("drop_checkpoint", job_id, fence))

    async def checkpoint(self, checkpoint: Checkpoint) -> bool:
        return bool(await self._tell("checkpoint", checkpoint.to_payload()))

    async def preview(self, preview: PreviewRecord) -> bool:
        return bool(await self._tell("preview", preview.to_payload()))

    async def _tell(self, method: str, *arguments: Any) -> Any:
        return await call(
            lambda: getattr(self._dispatcher, method).remote(*arguments), "The dispatcher"
        )


class RemotePrompts:
    """`generation.PromptSource` over the text encoder's handle."""

    def __init__(self, text_encoder: DeploymentHandle) -> None:
        self._text_encoder = text_encoder

    async def encode(self, prompt: str) -> EncodedPrompt:
        embeds, count, truncated = await call(
            lambda: self._text_encoder.encode.remote(prompt), "The text encoder"
        )
        return EncodedPrompt(embeds, count, truncated)


_CHECK_SECONDS = 30.0


class RemoteSafety:
    """`protocols.SafetyStage` over the moderator's handle; silence is ModerationUnavailable."""

    def __init__(self, moderator: DeploymentHandle, patience: float = 5.0) -> None:
        self._moderator = moderator
        self._patience = patience

    async def check_prompt(self, text: str, scope: CheckScope | None = None) -> Decision:
        limit = text_seconds(_CHECK_SECONDS, len(text))
        return await self._ask("check_prompt", text, _scope_payload(scope), limit=limit)

    async def check_image(self, pixels: Pixels, context: ImageContext) -> Decision:
        scope = _scope_payload(context.scope)
        return await self._ask(
            "check_image", pixels, context.prompt, list(context.references), scope
        )

    async def _ask(self, method: str, *content: object, limit: float = _CHECK_SECONDS) -> Decision:
        try:
            decision = await call(
                lambda: getattr(self._moderator, method).remote(*content),
                "The safety stage",
                patience=self._patience,
                limit=limit,
            )
        except CalotypeError as error:
            raise ModerationUnavailable(error.message, retry_after=5) from error
        return Decision.from_payload(decision)


def _scope_payload(scope: CheckScope | None) -> JsonObject | None:
    return None if scope is None else scope.to_payload()
