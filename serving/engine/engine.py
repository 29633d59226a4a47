"""The denoise loop: requests in, events out, one step at a time.

`Engine` admits requests, lets `scheduler.StepScheduler` choose the rows of each step, runs them and
tells what happened. It knows neither Ray nor HTTP; the deployments and the command line drive it.
"""

from __future__ import annotations

import logging
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from calotype.serving.core.errors import (
    CalotypeError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteLatents,
)
from calotype.serving.core.request import (
    Checkpoint,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Preview,
    Progress,
)
from calotype.serving.engine.control.control_store import ControlStore
from calotype.serving.engine.execution.admission import Admission
from calotype.serving.engine.execution.batch import DenoiseState, steps_done
from calotype.serving.engine.execution.checkpoint import restore, save
from calotype.serving.engine.execution.delivery import Delivery
from calotype.serving.engine.execution.denoiser import Denoiser
from calotype.serving.engine.execution.footprint import Footprint
from calotype.serving.engine.execution.step_profile import Profile
from calotype.serving.engine.execution.step_runner import (
    FiniteCheck,
    Stepped,
    StepRunner,
    no_room,
    typed,
)
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.conditioning import Conditioner
from calotype.serving.engine.model.decoder import Decoder
from calotype.serving.engine.parallel.sequence_parallel import SequenceGroup, build_forward
from calotype.serving.engine.sampling.guidance import prompts_of
from calotype.serving.engine.scheduling.scheduler import StepScheduler

if TYPE_CHECKING:
    from calotype.serving.engine.execution.admission import Embeds

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
        profile: how many are worth it on this machine.
        data_folder: where `calotype profile` may have left one; used if ``profile`` is None.
        memory_bytes: room for images in the making and their steps, besides the weights; None is
            what is free on a CUDA device, and no limit on a CPU.
        adapters, controls: what requests may name; empty stores if None.
        torch_threads: threads of torch in this process; None leaves torch's own choice.
        max_steps: most denoise steps of a request.
        preview_side: longest side of a preview in pixels.
        compiler: backend of torch.compile for the denoiser's blocks; None compiles nothing.
        group: devices that share each image; this engine is its rank 0 (`device_group`).
        clock: seconds for deadlines, of a clock that does not go back.
    """

    def __init__(
        self,
        components: Components,
        *,
        max_batch_rows: int = 8,
        adapters: AdapterStore | None = None,
        controls: ControlStore | None = None,
        torch_threads: int | None = None,
        max_steps: int = 1000,
        profile: Profile | None = None,
        data_folder: pathlib.Path | None = None,
        memory_bytes: float | None = None,
        preview_side: int = 256,
        compiler: str | None = None,
        group: SequenceGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.components = components
        self.adapters = adapters or AdapterStore(components.denoiser)
        self.controls = controls or ControlStore(components.denoiser)
        forward = build_forward(components, self.adapters.layers, compiler, group)
        self.devices = 1 if group is None else group.size
        self._denoiser = Denoiser(components.denoiser, forward, components.device, components.dtype)
        self._decoder = Decoder(components.vae)
        self._delivery = Delivery(self._decoder, preview_side)
        side = self._decoder.pixels_per_token
        conditioner = Conditioner(components.vae, components.dtype, side)
        self._admission = Admission(
            components, (self.adapters, self.controls), conditioner, side, max_steps, self.devices
        )
        self._footprint = Footprint(components, memory_bytes)
        if profile is None and data_folder is not None:
            profile = Profile.find(data_folder, components)
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
        self._wanted: set[str] = set()
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
        checkpoint: bytes | None = None,
    ) -> None:
        """Takes a request in; it starts at the next `step`.

        Args:
            embeds: the encoded prompt, [text tokens, joint_attention_dim]; None encodes it here.
            negative: the encoded negative prompt, likewise.
            files: the images that the request names, as PNG, JPEG or WebP.
            checkpoint: goes on from where one of this request was taken (`request.Checkpoint`).

        Raises:
            InvalidRequest: the request cannot be drawn by this model; nothing was taken in.
            NotFound: it names an adapter that was never loaded.
            OutOfMemory: it would not fit even if it were alone.
        """
        state = self._admission.prepare(request, embeds, negative, files or {})
        if checkpoint is not None:
            restore(state, checkpoint, self.components)
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

    def checkpoint(self, request_id: str) -> None:
        """Asks for a `Checkpoint` after the request's next step; unknown ids are no error."""
        with self._lock:
            if request_id in self._known:
                self._wanted.add(request_id)

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
                self._fail(state, self._typed(error, state), events)
        self._scheduler.completed(batch)
        if outcome.stepped:
            self._unchecked = FiniteCheck([done.row for done in outcome.stepped])
        # An abort that came during the step saves the decode.
        self._honour_aborts(events)
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
                started = self._admission.start(state)
            except Exception as error:
                self._fail(state, self._typed(error, state), events)
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
                done=[row.sampler.done for row in state.rows],
            )

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
        for request_id in check.broken() if check is not None else ():
            state = self._states.get(request_id)
            if state is not None:
                message = f"The model produced no finite numbers by step {state.steps_done}."
                self._fail(state, NonFiniteLatents(message), events)

    def _wants_preview(self, done: Stepped, before: int) -> bool:
        """Whether this evaluation ended a step that is shown; ``before`` it so many were done."""
        state = self._states.get(done.row.request_id)
        every = 0 if state is None else state.request.preview_every
        if state is None or not every or done.row.finished:
            return False
        steps = steps_done(done.row.sampler, state.steps)
        return steps > before and steps % every == 0

    def _show(self, stepped: Sequence[Stepped], events: list[Event]) -> None:
        """Decodes previews and finished images, and takes checkpoints."""
        seen = [
            done
            for done in stepped
            if (state := self._states.get(done.row.request_id)) is not None
            and self._wants_preview(done, state.reported)
        ]
        saved = [s for s in self._running(stepped) if self._is_saved(s)]
        finished = [done.row for done in stepped if done.row.finished]
        if seen or saved or finished:
            self._settle(events)
        for done in seen:
            state = self._states.get(done.row.request_id)
            pixels = None if state is None else self._delivery.preview(done, state.grid)
            if state is not None and pixels is not None:
                row, steps = done.row, steps_done(done.row.sampler, state.steps)
                events.append(Preview(row.request_id, row.index, steps, pixels))
        rows = [row for row in finished if row.request_id in self._states]
        for row, error in self._delivery.finish(rows, self._states):
            if row.request_id in self._states:
                state = self._states[row.request_id]
                self._fail(state, self._typed(error, state), events)
        for state in saved:
            if state.request.id in self._states and not all(r.finished for r in state.rows):
                self._save(state, events)

    def _running(self, stepped: Sequence[Stepped]) -> list[DenoiseState]:
        names = dict.fromkeys(done.row.request_id for done in stepped)
        return [self._states[name] for name in names if name in self._states]

    def _is_saved(self, state: DenoiseState) -> bool:
        every = state.request.checkpoint_every
        with self._lock:
            asked = state.request.id in self._wanted
        return asked or (every > 0 and state.steps_done - state.saved >= every)

    def _save(self, state: DenoiseState, events: list[Event]) -> None:
        # What was reused so far is not kept: from here on it is as if the request had just come.
        for cache in state.caches:
            cache.forget()
        state.saved = state.steps_done
        with self._lock:
            self._wanted.discard(state.request.id)
        data = save(state, self.components)
        events.append(Checkpoint(state.request.id, state.saved, data))

    # Endings

    def _report(self, request_id: str, events: list[Event]) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        steps = state.steps_done
        if steps > state.reported:
            state.reported = steps
            events.append(Progress(request_id, steps, state.steps, seconds=state.seconds))
        if len(state.images) == len(state.rows):
            images = tuple(state.images[i] for i in range(len(state.rows)))
            self._end(state)
            passes = sum(r.sampler.evaluations * len(r.passes) for r in state.rows)
            skipped = sum(cache.used for cache in state.caches)
            seen = state.bucket.reference_tokens
            events.append(Finished(request_id, images, state.seconds, passes, skipped, seen))

    def _typed(self, error: Exception, state: DenoiseState) -> CalotypeError:
        # A request that fits alone was admitted; what others hold is free when they are done.
        company = any(other is not state for other in self._states.values())
        return typed(error, state.request, in_company=company)

    def _fail(self, state: DenoiseState, error: CalotypeError, events: list[Event]) -> None:
        self._end(state)
        events.append(Failed(state.request.id, error))

    def _end(self, state: DenoiseState) -> None:
        request_id = state.request.id
        self._scheduler.remove(request_id)
        self._states.pop(request_id, None)
        self._pending = [s for s in self._pending if s is not state]
        self._admission.release(state)
        with self._lock:
            self._known.discard(request_id)
            self._aborted.discard(request_id)
            self._wanted.discard(request_id)
