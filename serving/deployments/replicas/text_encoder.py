"""The text encoder as a Ray Serve deployment: its own replica, because FLUX.2's needs a GPU."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ray import serve

from calotype.serving.config import ImageModel
from calotype.serving.core.errors import CalotypeError, Overloaded
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.reporting import ReplicaReport, report_forever
from calotype.serving.wire.application import TextEncoderConfig
from calotype.serving.worker.model_loader import load_text_encoder

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from calotype.serving.engine.model.text_encoder import TextEncoder

log = logging.getLogger(__name__)


class TextEncoderDeployment:
    def __init__(self, torch_threads: int, dispatcher: DeploymentHandle) -> None:
        self._threads = torch_threads
        self._name = serve.get_replica_context().replica_tag
        self._encoder: TextEncoder | None = None
        self._key = ""
        self._problem = ""
        self._loading: asyncio.Task[None] | None = None
        self._reporting = asyncio.get_running_loop().create_task(
            report_forever(dispatcher, self._state)
        )

    async def reconfigure(self, config: JsonObject) -> None:
        """Takes a `TextEncoderConfig`; returns at once, loads in the background."""
        model = TextEncoderConfig.model_validate(config).model
        key = model.spec.model_dump_json(include={"source", "precision", "device"})
        if key != self._key:
            self._key = key
            self._loading = asyncio.create_task(self._load(model))

    async def encode(self, prompt: str) -> tuple[Any, int, bool]:
        """Embeddings (float32 array [tokens, width]), token count, whether the end was cut off."""
        if self._encoder is None and self._loading is not None:
            await asyncio.wait([self._loading])
        encoder = self._encoder
        if encoder is None:
            raise Overloaded(f"The text encoder is not loaded. {self._problem}".strip())
        try:
            found = (await asyncio.to_thread(encoder.encode, [prompt]))[0]
        except (MemoryError, RuntimeError) as error:
            from calotype.serving.engine.execution.step_runner import is_out_of_memory

            # It shares its device with generators, whose memory is free again in a while.
            if not is_out_of_memory(error):
                raise
            raise Overloaded("The device has no memory left for the text encoder.") from error
        return found.embeds.float().cpu().numpy(), found.token_count, found.truncated

    def _state(self) -> ReplicaReport:
        ready = self._encoder is not None
        return ReplicaReport("text_encoder", self._name, ready, self._problem)

    async def _load(self, model: ImageModel) -> None:
        try:
            encoder = await asyncio.to_thread(load_text_encoder, model, torch_threads=self._threads)
        except CalotypeError as error:
            self._problem = error.message
            log.error("%s", error.message)
            return
        self._encoder, self._problem = encoder, ""
