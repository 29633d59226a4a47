"""`calotype train`: adapters from pictures."""

from __future__ import annotations

import datetime
import pathlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from calotype.serving.commands.customisation.dataset import given_rights, picture_options
from calotype.serving.commands.service_options import typed_command
from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.serving.training.lora.reporting import Sink
    from calotype.serving.training.lora.stages import Run
    from calotype.serving.wire.training_progress import TrainingEvent


@click.group()
def train() -> None:
    """Train adapters on pictures."""


@train.command()
@click.argument("source", required=False)
@click.option(
    "--config", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Run what an operator ordered with this training.json; progress is told over HTTP.",
)  # fmt: skip
@click.option("--host", default="0.0.0.0", show_default=True, help="Of progress, with --config.")
@click.option("--port", default=8000, show_default=True, help="Of progress, with --config.")
@click.option("--model", default="shapes", show_default=True, help="shapes, or a FLUX.2 folder.")
@click.option("--trigger", help="Word that evokes the adapter; put into every caption.")
@click.option(
    "--class-word", "class_words", multiple=True,
    help="What the trigger is one of: prompts with it keep what they drew. May be repeated.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    default=pathlib.Path("adapter.safetensors"), show_default=True, help="File to write.",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="Folder of cache, checkpoints, samples and events.  [default: beside the output]",
)  # fmt: skip
@click.option(
    "--preset", type=click.Choice(["fast", "balanced", "quality"]), default="balanced",
    show_default=True, help="How many steps, at which sizes.",
)  # fmt: skip
@click.option("--style", is_flag=True, help="It is a style: higher rank, no preservation.")
@click.option("--steps", type=int, help="Steps in all, in place of the preset's.")
@click.option("--resolution", type=int, help="Of all steps, in place of the preset's.")
@click.option("--rank", type=int, help="LoRA rank.")
@click.option("--batch", type=int, help="Pictures a step.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of noise and order.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "int8"]),
    help="Of the frozen base.  [default: bfloat16; a miniature float32]",
)  # fmt: skip
@click.option(
    "--sample", "prompts", multiple=True, metavar="PROMPT",
    help="Draw this on the way, through the serving engine. May be repeated.",
)  # fmt: skip
@click.option("--sample-every", type=int, help="Steps between samples.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.")
@picture_options
@click.option(
    "--without", multiple=True, metavar="SHA256",
    help="Do not learn from this picture: its rights were revoked. May be repeated.",
)  # fmt: skip
@click.option(
    "--price-per-hour", "hourly", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Of this machine, in USD; for the price that is shown.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 256), help="Torch threads.")
def lora(
    source: str | None,
    config: pathlib.Path | None,
    host: str,
    port: int,
    hourly: float,
    threads: int | None,
    **given: Any,
) -> None:
    """Train a LoRA adapter on the pictures of SOURCE.

    SOURCE is a folder, a zip or tar archive, or s3://BUCKET/PREFIX/. A run that was stopped or
    killed goes on exactly where it was when the same command is typed again.
    """
    from calotype.serving.training.lora.reporting import PrometheusSink
    from calotype.serving.training.lora.worker import read_order, serving_progress

    if (source is None) == (config is None):
        raise InvalidRequest("Give SOURCE, or --config.")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if config is not None:
        run = read_order(config)
        metrics = PrometheusSink(run.model.name)
        with serving_progress(run.work, metrics, host, port):
            _train(run, hourly, (metrics,))
    elif source is not None:
        _train(_run_of(source, **given), hourly, ())


def _run_of(source: str, *, model: str, trigger: str | None, class_words: tuple[str, ...],
            output: pathlib.Path, work: pathlib.Path | None, preset: Any, prompts: tuple[str, ...],
            holdout: float, distance: int, without: tuple[str, ...],
            **given: Any) -> Run:  # fmt: skip
    from calotype.serving.config import local_model
    from calotype.serving.core.request import ImageSize
    from calotype.serving.training.dataset.captions import Wording
    from calotype.serving.training.dataset.preparation import Options
    from calotype.serving.training.lora.recipe import build_recipe
    from calotype.serving.training.lora.stages import Run, read_config

    rights = given_rights(
        *(given.pop(n) for n in ("basis", "holder", "licence", "evidence", "expires"))
    )
    if output.suffix != ".safetensors":
        raise InvalidRequest(f"--output {output} must end in .safetensors.")
    resource = local_model(model)
    defaults = resource.spec.defaults
    size = ImageSize.parse(defaults.size)
    recipe = build_recipe(
        read_config(resource),
        preset,
        side=min(size.width, size.height),
        serving_guidance=defaults.guidance_scale,
        **{name: value for name, value in given.items() if value not in (None, False)},
    )
    return Run(
        resource,
        source,
        Options(
            resolution=recipe.resolutions[0],
            wording=Wording(trigger, class_words[0] if class_words else None),
            holdout=holdout,
            distance=distance,
            rights=rights,
            without=frozenset(without),
        ),
        recipe,
        trigger,
        class_words,
        work or output.with_suffix(".training"),
        output,
        prompts,
        command=typed_command(),
    )


def _train(run: Run, hourly: float, sinks: tuple[Sink, ...]) -> None:
    from calotype.moderation.moderator import Moderator
    from calotype.serving.training.lora.reporting import EventLog, TensorBoardSink
    from calotype.serving.training.lora.stages import train_lora
    from calotype.serving.training.lora.trainer import Price
    from calotype.serving.training.lora.workers import Workers

    workers = Workers.join()
    board = TensorBoardSink(run.work if workers.first else None)
    with _Progress() as progress, _stopping() as stopping:
        try:
            made = train_lora(
                run,
                EventLog(run.work, (progress, board, *sinks), quiet=not workers.first),
                screen=Moderator.load(),
                price=Price(hourly),
                stopping=lambda: bool(stopping),
                workers=workers,
                on_progress=progress.stage,
            )
        finally:
            board.close()
    if not workers.first:
        return
    if made is None:
        click.echo(f"Stopped; type the same command to go on. The run is in {run.work}.", err=True)
        sys.exit(130)
    click.echo(str(made))


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that is no longer empty once the process was asked to stop; asked again it stops."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """Shows a run's events as one bar, with the loss, the time left and the price left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._label = ""
        self._left: TrainingEvent | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, name: str, done: int, of: int) -> None:
        label = {"check": "Checking pictures", "cache": "Caching"}[name]
        self._open(label, of)
        self._bar.update(done - self._bar.pos)

    def __call__(self, event: TrainingEvent) -> None:
        if event.type in ("started", "resumed", "step"):
            self._open("Training", event.total_steps)
            self._left = event
            self._bar.update(event.step - self._bar.pos)
        elif event.type in (
            "sample_failed",
            "checkpoint_failed",
            "checkpoint_corrupt",
            "dataset_checked",
        ):
            self._close()
            click.echo(event.message or event.type, err=True)

    def _open(self, label: str, length: int) -> None:
        if self._bar is not None and self._label == label:
            return
        self._close()
        self._label, self._left = label, None
        self._bar = click.progressbar(
            length=length, label=label, file=sys.stderr, item_show_func=lambda _: self._said()
        )
        self._bar.__enter__()

    def _said(self) -> str | None:
        event = self._left
        if event is None or event.loss is None:
            return None
        parts = [f"loss {event.loss:.4f}"]
        if event.eta_seconds is not None:
            parts.append(f"{datetime.timedelta(seconds=round(event.eta_seconds))} left")
        if event.cost_left:
            parts.append(f"${event.cost_left:.2f} left")
        return ", ".join(parts)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
