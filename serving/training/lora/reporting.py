"""What a run tells: one stream of events, from which metrics and TensorBoard's files are made."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from calotype.serving.wire.training_progress import (
    EVENTS_FILE,
    EventType,
    TrainingEvent,
    read_events,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sink = Callable[[TrainingEvent], None]


class EventLog:
    """Writes events to a run's folder and hands each to the sinks.

    Args:
        quiet: tells nothing: of every worker but the first.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        sinks: tuple[Sink, ...] = (),
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._sinks, self._clock = folder / EVENTS_FILE, sinks, clock
        self._quiet = quiet
        self._sequence = max((event.sequence for event in read_events(folder)), default=0)
        self._end_cut_line()

    def _end_cut_line(self) -> None:
        """A kill may have cut the last line; the next event must begin a new one."""
        if self._path.exists() and (size := self._path.stat().st_size):
            with self._path.open("rb+") as file:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def tell(self, type_: EventType, **fields: Any) -> TrainingEvent:
        """Appends one event. A full disk loses the line, never the training."""
        self._sequence += 1
        event = TrainingEvent(sequence=self._sequence, time=self._clock(), type=type_, **fields)
        if self._quiet:
            return event
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(event.model_dump_json(by_alias=True, exclude_none=True) + "\n")
                if type_ != "step":
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:
            pass
        for sink in self._sinks:
            sink(event)
        return event


class PrometheusSink:
    """Keeps the metrics ``calotype_training_*`` of one run at its last event."""

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            made = Gauge(f"calotype_training_{name}", text, ["model"], registry=registry)
            return made.labels(model)

        self._step = gauge("step", "Steps that are done.")
        self._steps = gauge("steps", "Steps in all.")
        self._figures = {
            "loss": gauge("loss", "Mean loss of the last steps."),
            "learning_rate": gauge("learning_rate", "Learning rate now."),
            "seconds_per_step": gauge("step_seconds", "Median time of a step."),
            "eta_seconds": gauge("eta_seconds", "Predicted time until the end."),
            "cost": gauge("cost_dollars", "Device time so far, in USD."),
        }
        self._events = Counter(
            "calotype_training_events", "What it told.", ["model", "type"], registry=registry
        )
        self._model = model

    def __call__(self, event: TrainingEvent) -> None:
        self._step.set(event.step)
        if event.total_steps:
            self._steps.set(event.total_steps)
        for name, gauge in self._figures.items():
            if (value := getattr(event, name)) is not None:
                gauge.set(value)
        self._events.labels(self._model, event.type).inc()

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class TensorBoardSink:
    """Writes the curves, and samples as pictures, in TensorBoard's event format.

    Args:
        folder: of the run; None writes nothing.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        from tensorboardX import SummaryWriter

        self._run = folder
        where = None if folder is None else str(folder / "tensorboard")
        self._writer: Any = SummaryWriter(where, write_to_disk=folder is not None)

    def __call__(self, event: TrainingEvent) -> None:
        if event.type == "step":
            for name, value in (
                ("loss", event.loss),
                ("learning_rate", event.learning_rate),
                ("seconds_per_step", event.seconds_per_step),
            ):
                if value is not None:
                    self._writer.add_scalar(name, value, event.step)
        elif event.type == "sample_drawn" and event.file is not None and self._run is not None:
            pixels = _pixels(self._run / event.file)
            tag = f"sample/{pathlib.PurePath(event.file).stem.partition('-')[2]}"
            self._writer.add_image(tag, pixels, event.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _pixels(path: pathlib.Path) -> NDArray[Any]:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
