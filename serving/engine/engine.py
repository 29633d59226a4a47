"""The denoise loop: requests in, events out, one step at a time.

`Engine` admits requests, lets `scheduler.StepScheduler` choose the rows of each step, runs them and
tells what happened. It knows neither Ray nor HTTP; the deployments and the command line drive it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from calotype.serving.engine.adapters import AdapterStore
from calotype.serving.engine.admission import Admission
from calotype.serving.engine.batch import DenoiseState, Row
from calotype.serving.engine.components import Components
from calotype.serving.engine.conditioning import Conditioner
from calotype.serving.engine.decoder import Decoder
from calotype.serving.engine.denoiser import Denoiser
from calotype.serving.engine.footprint import Footprint
from calotype.serving.engine.guidance import prompts_of
from calotype.serving.engine.input_pictures import InputPictures, merge
from calotype.serving.engine.latents import TokenGrid
from calotype.serving.engine.scheduler import StepScheduler
from calotype.serving.engine.step_profile import Profile
from calotype.serving.engine.step_runner import FiniteCheck, Stepped, StepRunner, no_room, typed
from calotype.serving.errors import (
    CalotypeError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteLatents,
)
from calotype.serving.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Preview,
    Progress,
)

if TYPE_CHECKING:
    from calotype.serving.engine.admission import Embeds
    from calotype.serving.request import Pixels

logger = logging.getLogger(__name__)

_ADAPTER_WAIT = 0.02
"""Seconds that `step` waits when every request waits for an adapter file to be read."""


class Engine:
    """Draws requests of one model.

    `add` and `abort` may be called from any thread, `step` from one thread only. Every request that
    `add` accepted gets exactly one terminal event (`Finished` or `Failed`).

    Args:
        components: a model with denoiser and VAE, and its text encoder if `add` shall encode.
        max_batch_rows: denoiser passes that share one step at most.
        profile: how many are worth it on this machine; without one, as many as are allowed.
        memory_bytes: room for pictures in the making and their steps, besides the weights; None is
            what is free on a CUDA device, and no limit on a CPU.
        adapters: the LoRA adapters that requests may name; an empty store if None.
        torch_threads: threads of torch in this process; None leaves torch's own choice.
        max_steps: most denoise steps of a request.
        clock: seconds for deadlines, of a clock that does not go back.
    """

    def __init__(
        self,
        components: Components,
        *,
        max_batch_rows: int = 8,
        adapters: AdapterStore | None = None,
        torch_threads: int | None = None,
        max_steps: int = 1000,
        profile: Profile | None = None,
        memory_bytes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if components.denoiser is None or components.vae is None:
            raise ValueError("the engine needs components with denoiser and vae")
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.components = components
        self.adapters = adapters or AdapterStore(components.denoiser)
        self._denoiser = Denoiser(
            components.denoiser, self.adapters.layers, components.device, components.dtype
        )
        self._decoder = Decoder(components.vae)
        side = self._decoder.pixels_per_token
        self._conditioner = Conditioner(components.vae, components.dtype, side)
        self._admission = Admission(components, self.adapters, self._conditioner, side, max_steps)
        self._footprint = Footprint(components, memory_bytes)
        self._scheduler = StepScheduler(
            max_batch_rows,
            memory=self._footprint.memory,
            profile=None if profile is None else profile.bucket_rows,
        )
        self._clock = clock
        self._runner = StepRunner(self._denoiser, self._scheduler)
        self._lock = threading.Lock()
        self._arrived: list[DenoiseState] = []
        self._aborted: set[str] = set()
        self._known: set[str] = set()
        # What follows is touched by the stepping thread only.
        self._pending: list[DenoiseState] = []
        self._states: dict[str, DenoiseState] = {}
        self._unchecked: FiniteCheck | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do; false means that every request has ended."""
        with self._lock:
            return bool(self._known)

    @property
    def denoiser_seconds(self) -> float:
        """Time spent in the denoiser so far."""
        return self._runner.seconds

    def prompts_of(self, request: GenerationRequest) -> tuple[str, ...]:
        """The texts whose embeddings `add` wants: the prompt, and the negative one if it runs."""
        return prompts_of(request, needs_two_passes=self.components.settings.needs_two_passes)

    def add(
        self,
        request: GenerationRequest,
        embeds: Embeds | None = None,
        *,
        negative: Embeds | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Takes a request in; it starts at the next `step`.

        Args:
            embeds: the encoded prompt, [text tokens, joint_attention_dim]; None encodes it here.
            negative: the encoded negative prompt, likewise.
            files: the pictures that the request names, as PNG, JPEG or WebP.

        Raises:
            InvalidRequest: the request cannot be drawn by this model; nothing was taken in.
            NotFound: it names an adapter that was never loaded.
            OutOfMemory: it would not fit even if it were alone.
        """
        state = self._admission.prepare(request, embeds, negative, files or {})
        state.row_bytes = self._footprint.row(state)
        if not self._scheduler.fits(state.bucket, len(state.rows), state.row_bytes):
            raise no_room(request)
        if request.deadline_seconds is not None:
            state.deadline = self._clock() + request.deadline_seconds
        with self._lock:
            if request.id in self._known:
                raise InvalidRequest(f"The request {request.id!r} is already running.", param="id")
            self._known.add(request.id)
            self._arrived.append(state)

    def abort(self, request_id: str) -> None:
        """Ends a request before its next step, by `Failed(Cancelled)`; unknown ids are no error."""
        with self._lock:
            if request_id in self._known:
                self._aborted.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Runs one denoise step of one batch, and decodes what is finished by it."""
        events: list[Event] = []
        self._take_in(events)
        batch = self._scheduler.next_batch(self._clock())
        if batch is None:
            self._settle(events)
            if self._pending and not events:
                self.adapters.wait_for_change(_ADAPTER_WAIT)
            return events
        rows = [self._states[r.request_id].rows[r.index] for r in batch.rows]
        started = time.perf_counter()
        outcome = self._runner.run(rows, batch.bucket)
        self._settle(events)  # of the step before
        for row, error in outcome.failed:
            if row.request_id in self._states:
                state = self._states[row.request_id]
                self._fail(state, typed(error, state.request), events)
        self._scheduler.completed(batch)
        if outcome.stepped:
            self._unchecked = FiniteCheck([done.row for done in outcome.stepped])
        # An abort that came during the step saves the decode.
        self._honour_aborts(events)
        if any(self._is_shown(done) for done in outcome.stepped):
            self._settle(events)
        self._show(outcome.stepped, events)
        seconds = time.perf_counter() - started
        self._scheduler.measured(batch, seconds)
        for row in rows:
            alive = self._states.get(row.request_id)
            if alive is not None:
                alive.seconds += seconds / len(rows)
        for request_id in dict.fromkeys(done.row.request_id for done in outcome.stepped):
            self._report(request_id, events)
        return events

    # Taking in

    def _take_in(self, events: list[Event]) -> None:
        with self._lock:
            self._pending += self._arrived
            self._arrived = []
        self._honour_aborts(events)
        self._give_up_late(events)
        waiting, self._pending = self._pending, []
        for state in waiting:
            try:
                started = self._pin_adapters(state)
                if started:
                    self._condition(state)
            except Exception as error:
                self._fail(state, typed(error, state.request), events)
                continue
            if not started:
                self._pending.append(state)
                continue
            self._states[state.request.id] = state
            self._scheduler.add(
                state.request.id,
                state.bucket,
                rows=len(state.rows),
                evaluations=state.rows[0].sampler.evaluations,
                passes=len(state.rows[0].passes),
                priority=state.request.priority,
                tenant=state.request.tenant,
                weight=state.request.weight,
                deadline=state.deadline,
                row_bytes=state.row_bytes,
            )

    def _pin_adapters(self, state: DenoiseState) -> bool:
        """Acquires every adapter of a request, or none; False while one is being read."""
        refs = [ref for ref in state.request.adapters if ref.scale != 0.0]
        for ref in refs:
            adapter = self.adapters.acquire(ref.name)
            if adapter is None:
                self._release(state)
                return False
            state.pinned.append(adapter)
        stack = tuple((a, ref.scale) for a, ref in zip(state.pinned, refs, strict=True))
        for row in state.rows:
            row.stack = stack
        return True

    def _condition(self, state: DenoiseState) -> None:
        """Encodes the pictures that a request brought."""
        if state.inputs.start is not None or state.inputs.references:
            conditions = self._conditioner.encode(state.inputs)
            for row in state.rows:
                row.conditions = conditions
            state.inputs = dataclasses.replace(state.inputs, references=())

    def _honour_aborts(self, events: list[Event]) -> None:
        with self._lock:
            aborted, self._aborted = self._aborted, set()
            # One that was added and aborted since the last look is still among the arrivals.
            waiting = {s.request.id for s in self._arrived}
            self._aborted |= aborted & waiting
        for request_id in sorted(aborted - waiting):
            state = self._states.get(request_id) or next(
                (s for s in self._pending if s.request.id == request_id), None
            )
            if state is not None:
                self._fail(state, Cancelled("The request was cancelled."), events)

    def _give_up_late(self, events: list[Event]) -> None:
        """Fails what cannot be finished in time, so that it does not make others late, too."""
        now = self._clock()
        late = [self._states[request_id] for request_id in self._scheduler.hopeless(now)]
        late += [s for s in self._pending if s.deadline is not None and s.deadline < now]
        for state in late:
            message = (
                f"The picture could not be finished within {state.request.deadline_seconds:g} "
                "seconds; allow more time, or ask for fewer steps or a smaller size."
            )
            error = DeadlineExceeded(message, param="deadline_seconds")
            self._fail(state, error, events)

    # After a step

    def _settle(self, events: list[Event]) -> None:
        """Waits for the last step and fails the requests whose numbers are no longer finite."""
        check, self._unchecked = self._unchecked, None
        for row in check.broken() if check is not None else ():
            state = self._states.get(row.request_id)
            if state is not None:
                message = f"The model produced no finite numbers by step {state.steps_done}."
                self._fail(state, NonFiniteLatents(message), events)

    def _is_shown(self, done: Stepped) -> bool:
        return done.row.finished or self._wants_preview(done)

    def _wants_preview(self, done: Stepped) -> bool:
        state = self._states.get(done.row.request_id)
        every = 0 if state is None else state.request.preview_every
        return every > 0 and not done.row.finished and done.row.sampler.done % every == 0

    def _show(self, stepped: Sequence[Stepped], events: list[Event]) -> None:
        """Decodes previews and finished pictures."""
        for done in stepped:
            if self._wants_preview(done):
                self._preview(done, events)
        self._decode(
            [d.row for d in stepped if d.row.finished and d.row.request_id in self._states], events
        )

    def _preview(self, done: Stepped, events: list[Event]) -> None:
        row, state = done.row, self._states[done.row.request_id]
        try:
            pixels = self._decoder.decode(done.estimate().unsqueeze(0), state.grid)[0]
        except Exception as error:
            self._fail(state, typed(error, state.request), events)
            return
        events.append(Preview(state.request.id, row.index, row.sampler.done, pixels))

    def _decode(self, rows: Sequence[Row], events: list[Event]) -> None:
        if not rows:
            return
        grid = self._states[rows[0].request_id].grid
        at_once = self._decoder.rows_at_once(grid)
        for begin in range(0, len(rows), at_once):
            self._decode_together(rows[begin : begin + at_once], grid, events)

    def _decode_together(self, rows: Sequence[Row], grid: TokenGrid, events: list[Event]) -> None:
        latents = torch.stack([row.latents for row in rows if row.latents is not None])
        try:
            pictures = self._decoder.decode(latents, grid)
        except Exception as error:
            if len(rows) == 1:
                state = self._states.get(rows[0].request_id)
                if state is not None:
                    self._fail(state, typed(error, state.request), events)
                return
            logger.warning("decoding %d pictures failed, trying one by one: %r", len(rows), error)
            for row in rows:
                self._decode_together([row], grid, events)
            return
        for row, pixels in zip(rows, pictures, strict=True):
            state = self._states.get(row.request_id)
            if state is not None:
                state.images[row.index] = _restored(pixels, state.inputs)

    # Endings

    def _report(self, request_id: str, events: list[Event]) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        steps = state.steps_done
        if steps > state.reported:
            state.reported = steps
            events.append(Progress(request_id, steps, state.steps))
        if len(state.images) == len(state.rows):
            images = tuple(state.images[i] for i in range(len(state.rows)))
            self._end(state)
            passes = sum(r.sampler.evaluations * len(r.passes) for r in state.rows)
            skipped = sum(cache.used for cache in state.caches)
            events.append(Finished(request_id, images, state.seconds, passes, skipped))

    def _fail(self, state: DenoiseState, error: CalotypeError, events: list[Event]) -> None:
        self._end(state)
        events.append(Failed(state.request.id, error))

    def _end(self, state: DenoiseState) -> None:
        request_id = state.request.id
        self._scheduler.remove(request_id)
        self._states.pop(request_id, None)
        self._pending = [s for s in self._pending if s is not state]
        self._release(state)
        with self._lock:
            self._known.discard(request_id)
            self._aborted.discard(request_id)

    def _release(self, state: DenoiseState) -> None:
        for adapter in state.pinned:
            self.adapters.release(adapter)
        state.pinned = []


def _restored(pixels: Pixels, inputs: InputPictures) -> Pixels:
    """The picture with what was not to be drawn anew as it was given, to the bit."""
    if inputs.start is None or inputs.redraw is None or not inputs.exact:
        return pixels
    return merge(pixels, inputs.start, inputs.redraw)
