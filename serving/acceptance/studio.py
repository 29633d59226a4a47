"""Where the pictures of an acceptance set are drawn: on the path that requests take.

`LocalStudio` draws in this process with the engine of a replica; `ServiceStudio` asks a running
service, as its customers do. There is no sampler of the gate's own: an adapter that is good
elsewhere and weak where it serves is found out.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from calotype.serving.client.models import Job
from calotype.serving.client.synchronous import Client
from calotype.serving.config import ImageModel
from calotype.serving.core.errors import CalotypeError, ContentBlocked, error_from_payload
from calotype.serving.core.request import (
    AdapterRef,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.deployments.local import Drawn as DrawnImage
from calotype.serving.deployments.local import LocalPipeline

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

_PAUSES = (1.0, 5.0, 20.0)
"""Seconds before a picture is tried again that could not be checked."""
_AT_ONCE = 16
"""Jobs that a service has at a time."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of one prompt."""

    prompt: str
    seed: int
    pixels: Pixels | None
    """None where the safety stage refused the prompt or the picture."""
    refused: str = ""
    """What the safety stage said."""


class Studio(Protocol):
    """Draws prompts; picture i with ``seed + i``."""

    def draw(self, prompts: Sequence[str], seed: int, *, candidate: bool) -> Iterator[Drawn]:
        """In the order of the prompts.

        Args:
            candidate: with the candidate, or with what it is compared with.

        Raises:
            CalotypeError: something else than the safety stage prevents a picture.
        """
        ...


class LocalStudio:
    """Draws in this process.

    Args:
        adapter: the candidate's name in the pipeline, and its scale.
    """

    def __init__(
        self, model: ImageModel, pipeline: LocalPipeline, adapter: AdapterRef | None
    ) -> None:
        self._model, self._pipeline, self._adapter = model, pipeline, adapter

    def draw(self, prompts: Sequence[str], seed: int, *, candidate: bool) -> Iterator[Drawn]:
        defaults = self._model.spec.defaults
        size = ImageSize.parse(defaults.size)
        sampling = SamplingParams(defaults.steps, defaults.guidance_scale, defaults.sampler)
        adapters = (self._adapter,) if candidate and self._adapter is not None else ()
        for number, prompt in enumerate(prompts):
            request = GenerationRequest(
                id=f"acceptance-{number}",
                prompt=prompt,
                size=size,
                rendered_size=self._model.spec.check_size(size),
                sampling=sampling,
                seed=seed + number,
                adapters=adapters,
            )
            try:
                images, _ = self._drawn(request)
            except ContentBlocked as error:
                yield Drawn(prompt, request.seed, None, error.message)
            else:
                yield Drawn(prompt, request.seed, images[0].pixels)

    def _drawn(self, request: GenerationRequest) -> tuple[list[DrawnImage], int]:
        """A safety stage that is too slow for a moment does not lose what was drawn before."""
        for pause in _PAUSES:
            try:
                return self._pipeline.draw(request, lambda step, steps: None)
            except CalotypeError as error:
                if not error.retryable:
                    raise
            time.sleep(pause)
        return self._pipeline.draw(request, lambda step, steps: None)


class ServiceStudio:
    """Draws with a running service.

    Args:
        model: its name there.
        adapter: the candidate's name there and its scale; None = ``model`` itself is the candidate.
        base: the model that the candidate is compared with.
    """

    def __init__(
        self, client: Client, model: str, adapter: AdapterRef | None, base: str | None = None
    ) -> None:
        self._client, self._model, self._adapter = client, model, adapter
        self._base = base or model

    def draw(self, prompts: Sequence[str], seed: int, *, candidate: bool) -> Iterator[Drawn]:
        for start in range(0, len(prompts), _AT_ONCE):
            part = list(enumerate(prompts))[start : start + _AT_ONCE]
            jobs = [self._submit(prompt, seed + number, candidate) for number, prompt in part]
            for (number, prompt), job in zip(part, jobs, strict=True):
                yield self._finished(prompt, seed + number, job)

    def _submit(self, prompt: str, seed: int, candidate: bool) -> Job:
        parameters: dict[str, object] = {"prompt": prompt, "seed": seed, "output_format": "png"}
        if candidate and self._adapter is not None:
            parameters["loras"] = [{"id": self._adapter.name, "scale": self._adapter.scale}]
        return self._client.submit(parameters, model=self._model if candidate else self._base)

    def _finished(self, prompt: str, seed: int, job: Job) -> Drawn:
        import numpy as np
        from PIL import Image

        job = self._client.wait(job.id)
        if job.error is not None:
            error = job.error
            if error.get("code") == ContentBlocked.default_code:
                return Drawn(prompt, seed, None, str(error.get("message")))
            raise error_from_payload({"class": "EngineError", **error})
        if not job.images:
            raise CalotypeError(f"The job {job.id} has ended without a picture.")
        with Image.open(io.BytesIO(self._client.download(job.images[0]))) as image:
            return Drawn(prompt, seed, np.asarray(image.convert("RGB")))
