"""A training in a cluster: what the operator ordered, run to its end, and how far it is over HTTP.

The operator's ``training.json`` says what to learn; ``GET /internal/v1/training`` answers with the
last events, which lie on the volume beside the checkpoints. A pod that is taken away (suspend,
preemption) gets SIGTERM: the step that runs is ended and saved, and the next pod goes on from
there.
"""

from __future__ import annotations

import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from pydantic import ValidationError

from calotype.serving.config import ImageModel
from calotype.serving.config.lora_training import LoRATrainingSpec
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import ImageSize
from calotype.serving.training.dataset.captions import Wording
from calotype.serving.training.dataset.preparation import Options
from calotype.serving.training.lora.recipe import build_recipe
from calotype.serving.training.lora.stages import Run, read_config
from calotype.serving.wire.training_progress import TrainingProgress, read_events

if TYPE_CHECKING:
    from calotype.serving.training.lora.reporting import PrometheusSink

PATH = "/internal/v1/training"
ADAPTER_FILE = "adapter.safetensors"
_SAMPLES = 32
"""Newest that are told."""


def read_order(path: pathlib.Path) -> Run:
    """What the operator's ``training.json`` asks for.

    Raises:
        InvalidRequest: it is none, or names a data set that this worker cannot reach.
    """
    try:
        document: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        spec = LoRATrainingSpec.model_validate(document["spec"])
        model = ImageModel.model_validate(document["model"])
        output = pathlib.Path(str(document["outputDir"]))
        volume = document.get("volumeDir")
    except (OSError, ValueError, KeyError, ValidationError) as fault:
        raise InvalidRequest(
            f"{path} is no order of a training: {fault}.", param="config"
        ) from None
    defaults = model.spec.defaults
    size = ImageSize.parse(defaults.size)
    recipe = build_recipe(
        read_config(model),
        side=min(size.width, size.height),
        serving_guidance=defaults.guidance_scale,
        steps=spec.steps,
        resolution=spec.resolution,
        rank=spec.rank,
        learning_rate=spec.learning_rate,
        caption_dropout=spec.caption.dropout,
        seed=spec.seed,
    )
    trigger = spec.caption.trigger_word
    return Run(
        model,
        _place(spec, volume),
        Options(
            resolution=spec.resolution,
            wording=Wording(trigger=trigger, fallback=spec.caption.fallback),
        ),
        recipe,
        trigger,
        (),
        output,
        output / ADAPTER_FILE,
        described={"training": str(document.get("name", ""))},
    )


def _place(spec: LoRATrainingSpec, volume: object) -> str:
    data = spec.dataset
    if data.s3 is not None:
        return data.s3.uri
    if data.persistent_volume_claim is not None and volume is not None:
        return str(pathlib.Path(str(volume)) / data.persistent_volume_claim.path)
    raise InvalidRequest(
        "The data set must be on a volume or in a bucket: name it in spec.dataset."
        "persistentVolumeClaim or spec.dataset.s3.",
        param="spec.dataset",
    )


def progress_of(folder: pathlib.Path) -> TrainingProgress:
    """Where a run is, by its events."""
    step, loss, eta = None, None, None
    samples: list[JsonObject] = []
    for event in read_events(folder):
        if event.type in ("started", "resumed", "step", "checkpoint_saved", "suspended"):
            step = event.step
            loss = event.loss if event.loss is not None else loss
            eta = event.eta_seconds
        elif event.type == "sample_drawn" and event.file is not None:
            samples.append({"step": event.step, "url": (folder / event.file).as_uri()})
    return TrainingProgress(step=step, loss=loss, eta_seconds=eta, samples=samples[-_SAMPLES:])


@contextmanager
def serving_progress(
    folder: pathlib.Path, metrics: PrometheusSink, host: str, port: int
) -> Iterator[int]:
    """Within, `PATH` answers with the run's progress and ``/metrics`` with its metrics.

    Yields the port. It tells no secrets and takes no orders: it needs no token.
    """
    routes: dict[str, tuple[str, Callable[[], bytes]]] = {
        PATH: ("application/json", lambda: json.dumps(progress_of(folder).payload()).encode()),
        "/metrics": ("text/plain; version=0.0.4", metrics.exposition),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = routes.get(self.path)
            body = b"" if found is None else found[1]()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "text/plain" if found is None else found[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the name is the base's
            """Says nothing: it is asked every few seconds."""

    with ThreadingHTTPServer((host, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
