"""``spec.probe`` of an adapter: an image that its new revision must draw before it serves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import pathlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.core.decision import Decision, ImageContext
from calotype.serving.core.errors import AdapterLoadFailed, CalotypeError
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.core.request import (
    AdapterRef,
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.jobs.moderation_checks import CheckRetries, check_with_retries
from calotype.serving.weights.sources import adapter_revision
from calotype.serving.worker.engine_thread import EngineInputs, EngineThread

if TYPE_CHECKING:
    from calotype.serving.worker.prompt_source import PromptSource

log = logging.getLogger(__name__)

LOAD_SECONDS = 600.0
RETRY_SECONDS = 5.0
"""Pause after the text encoder or the safety stage could not be reached."""


class AdapterProbe:
    """Probes of one engine. A revision that drew its image is not probed again."""

    def __init__(
        self, engine: EngineThread, model: ImageModel, prompts: PromptSource, safety: SafetyStage
    ) -> None:
        self._engine, self._model = engine, model
        self._prompts, self._safety = prompts, safety
        self._proved: dict[str, str] = {}

    def wanted(self, adapter: LoRAAdapter, file: pathlib.Path) -> bool:
        """Whether the file must draw its image before it is loaded under the adapter's name."""
        if adapter.spec.probe is None:
            return False
        return self._proved.get(adapter.name) != _key(adapter, file)

    async def problem_of(self, adapter: LoRAAdapter, file: pathlib.Path) -> str:
        """Draws the probe with the file; the sentence that says why it does not pass, or "".

        Waits as long as the text encoder or the safety stage cannot be reached.
        """
        while True:
            try:
                await self._draw(adapter, file)
            except CalotypeError as error:
                if not error.retryable:
                    return f"spec.probe was not drawn: {error.message}"
                log.warning("the probe of the adapter %s waits: %s", adapter.name, error.message)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._proved[adapter.name] = _key(adapter, file)
                return ""

    async def _draw(self, adapter: LoRAAdapter, file: pathlib.Path) -> None:
        """Raises CalotypeError when the file does not load or its image is not drawn or refused."""
        probe = adapter.spec.probe
        assert probe is not None
        await self._check("prompt", lambda: self._safety.check_prompt(probe.prompt))
        encoded = await self._prompts.encode(probe.prompt)
        # Beside the revision that serves, under a name that no request can have.
        name = f"{adapter.name} (probe)"
        store, defaults = self._engine.engine.adapters, self._model.spec.defaults
        size, context = ImageSize.parse(defaults.size), ImageContext(probe.prompt, (), None)
        request = GenerationRequest(
            id=name,
            prompt=probe.prompt,
            size=size,
            rendered_size=self._model.spec.check_size(size),
            sampling=SamplingParams(
                steps=defaults.steps,
                guidance_scale=defaults.guidance_scale,
                sampler=defaults.sampler,
            ),
            seed=probe.seed,
            n=1,
            adapters=(AdapterRef(name, adapter.spec.scale.default),),
        )
        try:
            await asyncio.to_thread(store.load, name, file, wait=LOAD_SECONDS)
            async with contextlib.aclosing(
                self._engine.draw(request, EngineInputs(encoded.embeds))
            ) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Finished):
                        image = event.images[0]
                        await self._check(
                            "picture",
                            functools.partial(self._safety.check_image, image, context),
                        )
        finally:
            store.unload(name)

    async def _check(self, what: str, check: Callable[[], Awaitable[Decision]]) -> None:
        decision = await check_with_retries(check, CheckRetries(), asyncio.sleep)
        if decision.blocked:
            named = ", ".join(decision.categories)
            raise AdapterLoadFailed(f"the safety stage blocks its {what} ({named}).")


def _key(adapter: LoRAAdapter, file: pathlib.Path) -> str:
    stat = file.stat()
    revision = f"{adapter_revision(adapter)} {stat.st_mtime_ns} {stat.st_size}"
    return f"{revision}\n{adapter.spec.probe}"
