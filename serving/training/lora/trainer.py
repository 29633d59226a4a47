"""The train stage: steps from the cache to factors, resumable at every step.

Whatever stops a run (a kill, a signal, a full disk, a loss that is no number) leaves its last
checkpoint, and the same call goes on from there to the same adapter, bit for bit on one machine.
"""

from __future__ import annotations

import math
import pathlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from calotype.serving.core.errors import OutOfMemory, StorageFailed, TrainingFailed
from calotype.serving.engine.model.components import Components
from calotype.serving.training.lora.cache import CachedSet, step_generator
from calotype.serving.training.lora.checkpoint import Checkpoint, Checkpoints
from calotype.serving.training.lora.factors import LoraFactors
from calotype.serving.training.lora.objective import Objective, learning_rate
from calotype.serving.training.lora.optimizer import Optimizer
from calotype.serving.training.lora.recipe import Recipe
from calotype.serving.training.lora.reporting import EventLog
from calotype.serving.training.lora.targets import find_targets
from calotype.serving.training.lora.workers import Workers
from calotype.serving.wire.training_progress import EventType

_WINDOW = 100
"""Steps over which the loss that is told is averaged, and compared."""
_FAR, _LONG = 3.0, 20
"""A loss of more than so many times the running median, for so many steps, has diverged."""
_TOLD_EVERY = 10
_TIMES = 50

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Price:
    """Of the device, in USD an hour; 0 where it costs nothing."""

    hourly: float = 0.0

    def of(self, seconds: float) -> float:
        return self.hourly * seconds / 3600


class Trainer:
    """Trains factors on a cached set.

    Args:
        events: where the run tells how far it is.
        checkpoints: where it is saved; the newest one is where it goes on.
        on_sample: draws samples of the averaged factors after so many steps; None draws none.
        stopping: asked before every step; true saves and ends the run unfinished.
        workers: processes that share each step.
    """

    def __init__(
        self,
        components: Components,
        cached: CachedSet,
        recipe: Recipe,
        events: EventLog,
        checkpoints: Checkpoints,
        *,
        price: Price = Price(),
        on_sample: Callable[[int, Factors], None] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        workers: Workers | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        model = components.denoiser
        self._recipe, self._cached, self._events = recipe, cached, events
        self._checkpoints, self._on_sample, self._stopping = checkpoints, on_sample, stopping
        self._price, self._clock, self._workers = price, clock, workers or Workers()
        self._factors = LoraFactors(
            find_targets(model, model.config),
            rank=recipe.rank,
            scale=recipe.alpha / recipe.rank,
            seed=recipe.seed,
        )
        self._objective = Objective(
            model,
            self._factors,
            guidance=recipe.guidance,
            lean=recipe.lean,
            recompute=recipe.recompute,
        )
        self._optimizer = Optimizer(self._factors.vector, recipe)
        self._step, self._seconds, self._bad = 0, 0.0, 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._saved = -1

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._step

    def run(self) -> Factors | None:
        """Trains to the end; the averaged factors, or None where `stopping` ended it.

        Raises:
            TrainingFailed: the loss diverged (``loss_diverged``), or no checkpoint can be read.
            Conflict: the folder's checkpoints are of another run.
        """
        try:
            self._resume()
            first = self._workers.first
            while self._step < self._recipe.steps:
                if self._workers.any(self._stopping()):
                    self._save(last=True)
                    self._tell("suspended", message="It goes on from here when it is run again.")
                    return None
                self._run_step()
                every = self._recipe.checkpoint_every
                if self._step % every == 0 or self._step == self._recipe.steps:
                    self._save(last=self._step == self._recipe.steps)
                if self._step % _TOLD_EVERY == 0 or self._step == self._recipe.steps:
                    self._tell("step")
                samples = self._recipe.sample_every
                if self._on_sample is not None and samples and self._step % samples == 0 and first:
                    self._on_sample(self._step, self._averaged())
            return self._averaged()
        except torch.OutOfMemoryError as fault:
            raise OutOfMemory(
                f"The device ran out of memory at step {self._step + 1}. Take a smaller "
                "--resolution or --precision int8; `calotype plan --train lora` says what fits.",
                "insufficient_memory",
                "resolution",
            ) from fault
        finally:
            self._factors.remove()
            self._objective.close()

    def _averaged(self) -> Factors:
        with self._factors.holding(self._optimizer.average):
            return {n: (a.clone(), b.clone()) for n, (a, b) in self._factors.named().items()}

    def _resume(self) -> None:
        def damaged(path: pathlib.Path, why: str) -> None:
            if self._workers.first:
                self._events.tell("checkpoint_corrupt", file=path.name, message=why)

        found = self._checkpoints.latest(damaged)
        if found is None:
            self._tell("started")
            return
        self._optimizer.restore(found.tensors)
        self._step, self._seconds = found.step, found.seconds
        self._losses.extend(found.losses)
        self._saved = found.step
        self._tell("resumed")

    def _run_step(self) -> None:
        recipe, step, began = self._recipe, self._step, self._clock()
        gradient = self._factors.vector.grad
        assert gradient is not None
        gradient.zero_()
        batch = self._cached.batch(
            step, recipe.resolution_at(step), recipe.batch, recipe.caption_dropout, recipe.seed
        )
        part = self._workers.part(recipe.batch)
        generator = step_generator(recipe.seed, step)
        error = self._objective.loss(batch, generator, part)
        error.backward()  # type: ignore[no-untyped-call]
        if (
            recipe.preserve_every
            and step % recipe.preserve_every == 0
            and batch.classes is not None
        ):
            change = self._objective.preservation(batch, generator, part)
            (recipe.preserve_weight * change).backward()  # type: ignore[no-untyped-call]
        self._workers.average(gradient)
        told = error.detach().clone()
        self._workers.average(told)
        loss = float(told)
        self._check(loss)
        rate = learning_rate(step, recipe.steps, recipe.learning_rate)
        self._optimizer.step(step, rate)
        self._step += 1
        self._losses.append(loss)
        taken = self._clock() - began
        self._seconds += taken
        self._times.append(taken)

    def _check(self, loss: float) -> None:
        usual = statistics.median(self._losses) if len(self._losses) >= _LONG else math.inf
        self._bad = self._bad + 1 if loss > _FAR * usual else 0
        if math.isfinite(loss) and self._bad < _LONG:
            return
        what = (
            "is no finite number"
            if not math.isfinite(loss)
            else (f"was above {_FAR:g} times its median for {_LONG} steps")
        )
        kept = (
            f"the checkpoint of step {self._saved} is kept"
            if self._saved > 0
            else ("there is no checkpoint yet")
        )
        raise TrainingFailed(
            f"The loss {what} at step {self._step + 1}; {kept}. Train with a lower learning rate "
            f"than {self._recipe.learning_rate:g}, and look for pictures of one colour.",
            code="loss_diverged",
            param="learning_rate",
        )

    def _save(self, *, last: bool) -> None:
        if self._saved == self._step:
            return
        if not self._workers.first:
            self._saved = self._step
            return
        state = Checkpoint(
            self._step, self._optimizer.tensors(), tuple(self._losses), self._seconds
        )
        try:
            path = self._checkpoints.save(state)
        except StorageFailed as fault:
            self._tell("checkpoint_failed", message=str(fault))
            if last:
                raise
            return
        self._saved = self._step
        self._tell("checkpoint_saved", file=f"checkpoints/{path.name}")

    def _tell(self, type_: EventType, **fields: object) -> None:
        if not self._workers.first:
            return
        left = self._recipe.steps - self._step
        usual = statistics.median(self._times) if self._times else None
        eta = None if usual is None else usual * left
        self._events.tell(
            type_,
            step=self._step,
            total_steps=self._recipe.steps,
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            learning_rate=learning_rate(
                max(0, self._step - 1), self._recipe.steps, self._recipe.learning_rate
            ),
            seconds_per_step=usual,
            eta_seconds=eta,
            cost=self._price.of(self._seconds),
            cost_left=None if eta is None else self._price.of(eta),
            **fields,
        )
