"""One denoise step of one batch, in which only the culprit of a fault fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from calotype.serving.core.errors import CalotypeError, EngineError, GroupLost, OutOfMemory
from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.execution.batch import Row
from calotype.serving.engine.execution.denoiser import Denoiser
from calotype.serving.engine.scheduling.scheduler import Bucket, StepScheduler

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Stepped:
    """A row that went through a step.

    Attributes:
        row: its latents are those after the step.
        place: where it is in the batch.
        velocity: what the denoiser said of the batch, [rows, tokens, channels].
        latents: what it was said of.
        sigma: the row's noise level in ``latents``.
    """

    row: Row
    place: int
    velocity: torch.Tensor
    latents: torch.Tensor
    sigma: float

    def estimate(self) -> torch.Tensor:
        """The latents of the finished image, as far as can be said now: [tokens, channels]."""
        return self.latents[self.place] - self.sigma * self.velocity[self.place]


@dataclass(slots=True)
class StepOutcome:
    stepped: list[Stepped] = field(default_factory=list)
    failed: list[tuple[Row, Exception]] = field(default_factory=list)


class StepRunner:
    """Runs batches; a batch that raises is run again row by row, so that one row fails alone."""

    def __init__(self, denoiser: Denoiser, scheduler: StepScheduler) -> None:
        self._denoiser, self._scheduler = denoiser, scheduler
        self.seconds = 0.0
        """Time spent in the denoiser and in stepping latents so far."""

    def run(self, rows: Sequence[Row], bucket: Bucket) -> StepOutcome:
        outcome = StepOutcome()
        self._run(rows, bucket, outcome)
        return outcome

    def _run(self, rows: Sequence[Row], bucket: Bucket, outcome: StepOutcome) -> None:
        started = time.perf_counter()
        try:
            limit = self._scheduler.row_limit(bucket)
            velocity, latents = self._denoiser.run(rows, bucket, limit)
            sigmas = [row.sampler.sigma for row in rows]
        except GroupLost:
            raise  # no row's fault, and no row can be run any more
        except Exception as error:
            if len(rows) == 1:
                outcome.failed.append((rows[0], error))
                return
            logger.warning("a batch of %d rows failed and is run row by row: %r", len(rows), error)
            if is_out_of_memory(error):
                self._scheduler.limit_rows(bucket, len(rows) // 2)
            for row in rows:
                self._run([row], bucket, outcome)
            return
        finally:
            self.seconds += time.perf_counter() - started
        started = time.perf_counter()
        failed = self._denoiser.advance(rows, velocity, latents)
        self.seconds += time.perf_counter() - started
        outcome.failed += failed
        broken = {id(row) for row, _ in failed}
        outcome.stepped += [
            Stepped(row, i, velocity, latents, sigmas[i])
            for i, row in enumerate(rows)
            if id(row) not in broken
        ]


class FiniteCheck:
    """Whether the latents of a step are finite numbers, asked without stopping the device.

    The answer travels to the host while the next step is being queued; it is waited for one step
    later. That wait also keeps the host from running ahead of the device by more than a step, so
    that an abort is honoured at the next one.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        # Their names only: a request that is aborted meanwhile must not be kept in memory.
        self._names = [row.request_id for row in rows]
        # One number that is not finite makes the sum so; latents are far from where sums overflow.
        latents = [row.latents for row in rows if row.latents is not None]
        flags = torch.stack(latents).sum((1, 2), dtype=torch.float32).isfinite()
        self._event: Any = None
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._flags = flags

    def broken(self) -> list[str]:
        """The requests with NaN or infinity, one name for each row; waits for the step to end."""
        if self._event is not None:
            self._event.synchronize()
        return [name for name, ok in zip(self._names, self._flags.tolist(), strict=True) if not ok]


def is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError that names its allocator.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def no_room(request: GenerationRequest, in_company: bool = False) -> OutOfMemory:
    """The error of a request that is too large, or for which others left no memory."""
    return OutOfMemory(
        f"There is not enough memory for a picture of {request.rendered_size}; ask for a smaller "
        "size.",
        param="size",
        details={"part": "device_memory"} if in_company else None,
    )


def typed(
    error: Exception, request: GenerationRequest, *, in_company: bool = False
) -> CalotypeError:
    """The error that a request ends with.

    Args:
        in_company: others were on the device.
    """
    if isinstance(error, CalotypeError):
        return error
    if is_out_of_memory(error):
        return no_room(request, in_company)
    logger.error("the request %s failed", request.id, exc_info=error)
    return EngineError(f"The model failed on this request: {type(error).__name__}.")
