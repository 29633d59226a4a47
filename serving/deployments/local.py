"""The whole way of a request in one process, without Ray: for the command line and for tests."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from calotype.moderation.decision import Decision as ModerationDecision
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.rulebook import Scope
from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.core.errors import ContentBlocked
from calotype.serving.core.protocols import BlobStore, ModelStatus, SafetyStage, SystemClock
from calotype.serving.core.request import Failed, Finished, GenerationRequest, Progress
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.images.encode import blur, given_images
from calotype.serving.jobs.moderation_checks import refusal, unavailable
from calotype.serving.worker.drawn_images import Fate, at_requested_size, fate_of
from calotype.serving.worker.model_loader import load_model, load_text_encoder
from calotype.serving.worker.prompt_source import EncodedPrompt
from calotype.serving.worker.replica import GeneratorReplica, ReplicaSettings

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels
    from calotype.serving.engine.model.text_encoder import TextEncoder


LOAD_SECONDS = 600.0


class InProcessSafety:
    """`protocols.SafetyStage` around a `Moderator` of this process."""

    def __init__(self, moderator: Moderator) -> None:
        self._moderator = moderator

    async def check_prompt(self, text: str, scope: CheckScope | None = None) -> Decision:
        check = partial(self._moderator.check_prompt, text, _scope(scope))
        return Decision.from_payload((await asyncio.to_thread(check)).to_payload())

    async def check_image(self, pixels: Pixels, context: ImageContext) -> Decision:
        check = partial(
            self._moderator.check_image,
            pixels,
            prompt=context.prompt,
            references=context.references,
            scope=_scope(context.scope),
        )
        return Decision.from_payload((await asyncio.to_thread(check)).to_payload())


def _scope(scope: CheckScope | None) -> Scope:
    return Scope.from_payload(None if scope is None else scope.to_payload())


class InProcessPrompts:
    """`generation.PromptSource` around a text encoder of this process."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    async def encode(self, prompt: str) -> EncodedPrompt:
        found = (await asyncio.to_thread(self._encoder.encode, [prompt]))[0]
        return EncodedPrompt(found, found.token_count, found.truncated)


class LocalBackend:
    """`protocols.GenerationBackend` in one process: dispatcher and generator on one event loop."""

    def __init__(
        self,
        model: ImageModel,
        adapters: Sequence[LoRAAdapter],
        database: Database,
        blobs: BlobStore,
        safety: SafetyStage,
        policy: DispatchPolicy | None = None,
    ) -> None:
        self._model, self._adapters = model, list(adapters)
        self._blobs, self._safety = blobs, safety
        self._policy = policy = policy or DispatchPolicy()
        self._dispatcher = Dispatcher(database, safety, SystemClock(), policy, model=model.name)
        self._replica: GeneratorReplica | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalBackend]:
        """Loads the model and draws until the context ends."""
        encoder = await asyncio.to_thread(load_text_encoder, self._model)
        await self._dispatcher.start()
        self._replica = GeneratorReplica(
            ReplicaSettings("local", check_retries=self._policy.check_retries),
            self._dispatcher,
            InProcessPrompts(encoder),
            self._safety,
            self._blobs,
        )
        self._replica.configure(self._model, self._adapters)
        try:
            yield self
        finally:
            await self._replica.close()
            await self._dispatcher.stop()

    async def submit(self, job_id: str) -> None:
        await self._dispatcher.submit(job_id)

    async def wait(self, job_id: str, timeout: float) -> None:
        await self._dispatcher.wait(job_id, timeout)

    async def cancel(self, job_id: str) -> None:
        await self._dispatcher.cancel(job_id)

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        context = ImageContext.of_upload(scope)
        return [
            *[await self._safety.check_prompt(text, scope) for text in texts],
            *[await self._safety.check_image(image, context) for image in images],
        ]

    async def status(self) -> list[ModelStatus]:
        if self._replica is None:
            return [ModelStatus(self._model.name, ready=False)]
        state = self._replica.state()
        return [
            ModelStatus(
                self._model.name,
                ready=state.ready,
                replicas=int(state.ready),
                queue_seconds=self._dispatcher.backlog_seconds(),
                adapters=dict(state.adapters),
                message=state.message,
            )
        ]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One allowed image."""

    index: int
    seed: int
    pixels: Pixels
    flagged: bool


class LocalPipeline:
    """Draws requests one after the other in this process, behind the same safety stage.

    Args:
        adapters: name -> safetensors file.
        controls: likewise of control adapters.
    """

    def __init__(
        self,
        model: ImageModel,
        adapters: dict[str, pathlib.Path],
        moderator: Moderator,
        torch_threads: int | None = None,
        controls: Mapping[str, pathlib.Path] | None = None,
    ) -> None:
        self.model = model
        self._moderator = moderator
        self._engine = load_model(
            model,
            parts=("text_encoder", "denoiser", "vae"),
            torch_threads=torch_threads,
            accelerated=False,
        ).engine
        for name, path in adapters.items():
            self._engine.adapters.load(name, path)
        for name, path in (controls or {}).items():
            self._engine.controls.load(name, path)

    def load_adapter(self, name: str, path: pathlib.Path) -> None:
        """Loads a file, in the place of the one that had the name.

        Raises:
            AdapterLoadFailed: it is no adapter of the model; what had the name still draws.
        """
        self._engine.adapters.load(name, path, wait=LOAD_SECONDS)

    def draw(
        self,
        request: GenerationRequest,
        on_step: Callable[[int, int], None],
        files: Mapping[str, bytes] | None = None,
    ) -> tuple[list[Drawn], int]:
        """The allowed images, and how many were blocked; ``on_step(step, steps)`` as it goes.

        Args:
            files: the images that the request names, as PNG, JPEG or WebP.

        Raises:
            ContentBlocked: the prompt, or every image, is refused.
            ModerationUnavailable: the safety stage cannot decide.
            EngineError: it cannot be drawn.
        """
        blocked = refusal(
            "input", _decided(self._moderator.check_prompt(request.prompt)), request.id
        )
        if blocked is not None:
            raise blocked
        given = files or {}
        images = at_requested_size(request, list(self._run(request, on_step, given)), given)
        seen = given_images(request, given)
        drawn: list[Drawn] = []
        refused: list[ContentBlocked] = []
        for index, pixels in enumerate(images):
            decision = _decided(
                self._moderator.check_image(pixels, prompt=request.prompt, references=seen)
            )
            fate = fate_of(decision, held_by_prompt=False, sealable=False)
            if fate is Fate.BLOCK:
                blocked = refusal("output", decision, request.id)
                assert blocked is not None
                refused.append(blocked)
                continue
            shown = blur(pixels) if fate is Fate.BLUR else pixels
            drawn.append(Drawn(index, request.seed + index, shown, decision.flagged))
        if not drawn:
            raise refused[0]
        return drawn, len(refused)

    def _run(
        self,
        request: GenerationRequest,
        on_step: Callable[[int, int], None],
        files: Mapping[str, bytes],
    ) -> Iterator[Pixels]:
        self._engine.add(request, files=files)
        try:
            while self._engine.has_work:
                for event in self._engine.step():
                    if isinstance(event, Progress):
                        on_step(event.step, event.steps)
                    elif isinstance(event, Failed):
                        raise event.error
                    elif isinstance(event, Finished):
                        yield from event.images
        finally:
            self._engine.abort(request.id)


def _decided(found: ModerationDecision) -> Decision:
    """Raises ModerationUnavailable where nothing could be decided."""
    decision = Decision.from_payload(found.to_payload())
    if decision.undecided:
        raise unavailable(decision.reason or "a classifier failed")
    return decision
