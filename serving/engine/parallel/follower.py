"""A process of a `device_group.DeviceGroup`, which starts it with ``python -m``.

It reads its settings and then its orders from the standard input, says on the standard output that
it is ready or why not, and ends when the input does.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import queue
import sys
import threading
from collections.abc import Iterator
from typing import IO

import torch

from calotype.serving.core.errors import CalotypeError
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.parallel.device_group import RankSettings, meet
from calotype.serving.engine.parallel.sequence_parallel import Order, SequenceGroup, follow
from calotype.serving.observability.logs import set_up_logs


def main() -> None:
    source = sys.stdin.buffer
    settings = RankSettings(**json.loads(source.readline()))
    # What libraries print must not be taken for an answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    set_up_logs()
    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    cuda = settings.device != "cpu"
    if cuda:
        torch.cuda.set_device(settings.rank)
    try:
        components = load_components(
            pathlib.Path(settings.folder),
            parts=("denoiser",),
            device=settings.device,
            precision=settings.precision,
        )
    except (CalotypeError, RuntimeError) as error:  # torch's own: not enough memory, above all
        _say(answer, " ".join(str(error).split()))
        sys.exit(1)
    store = AdapterStore(
        components.denoiser, max_rank=settings.max_rank, budget_bytes=settings.adapter_bytes
    )
    orders = _orders(source)
    _say(answer, "ready")
    meet(settings.meeting, settings.rank, settings.size, cuda)
    follow(components, SequenceGroup(), orders, store)


def _say(answer: IO[str], line: str) -> None:
    answer.write(line + "\n")
    answer.flush()


def _orders(source: IO[bytes]) -> Iterator[Order]:
    """The orders as they come. The process ends with them, even in the middle of a step."""
    found: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                found.put(pickle.load(source))
            except (EOFError, pickle.UnpicklingError):
                # Rank 0 is done or dead; a step that waits for it would wait for ever.
                os._exit(0)

    threading.Thread(target=read, name="orders", daemon=True).start()
    return iter(found.get, None)


if __name__ == "__main__":
    main()
