"""A thousand requests of every kind: each ends once, and memory does not grow."""

from __future__ import annotations

import gc
import pathlib
import random
from collections import Counter
from dataclasses import replace

import psutil
from engine_load import Rows, new_prompt, row

from calotype.serving.core.errors import Cancelled
from calotype.serving.core.request import (
    SAMPLER_NAMES,
    AdapterRef,
    Checkpoint,
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import Components
from calotype.serving.testing.models import save_random_lora

REQUESTS = 1000
WARM = 250
"""Requests after which memory is looked at for the first time: caches and pools are full then."""

_SIZES = (ImageSize(64, 64), ImageSize(96, 64), ImageSize(128, 64), ImageSize(128, 128))
_LORAS = 6
_AT_ONCE = 24


def soak(components: Components, scratch: pathlib.Path, requests: int = REQUESTS) -> Rows:
    """Draws and aborts requests at random; sizes, adapters, samplers and the rest are mixed.

    A third is aborted, adapters are replaced under way and do not all fit into their budget, and
    some requests go on from a checkpoint under another name.
    """
    traffic = _Traffic(components, scratch)
    sizes = []
    for number in range(requests):
        traffic.arrive(number)
        while traffic.waiting >= _AT_ONCE:
            traffic.step()
        if number >= WARM and number % 50 == 0:
            sizes.append(traffic.resident_bytes())
    while traffic.engine.has_work:
        traffic.step()
    sizes.append(traffic.resident_bytes())
    traffic.engine.adapters.layers.remove()
    endings = Counter(traffic.endings.values())
    once = endings[1] == len(traffic.endings) == traffic.arrived
    wrong = 0 if once else traffic.arrived - endings[1]
    growth = 100 * (max(sizes) / sizes[0] - 1)
    return {
        f"memory growth over {requests:,} requests with aborts": row(growth, "%", 5.0, "lower"),
        f"of {traffic.arrived:,} requests without exactly one ending": row(
            wrong, "requests", 0, "lower"
        ),
    }


class _Traffic:
    """An engine and what comes to it."""

    def __init__(self, components: Components, scratch: pathlib.Path) -> None:
        self._components, self._scratch = components, scratch
        self._chance = random.Random(7)
        self.endings: dict[str, int] = {}
        self.arrived = 0
        self._running: dict[str, GenerationRequest] = {}
        files = [self._lora(i, seed=i) for i in range(_LORAS)]
        room = 4 * files[0].stat().st_size
        store = AdapterStore(components.denoiser, budget_bytes=room, cpu_budget_bytes=room)
        for i, path in enumerate(files):
            store.load(f"lora{i}", path, wait=60)
        self.engine = Engine(components, adapters=store)

    @property
    def waiting(self) -> int:
        return len(self._running)

    def arrive(self, number: int) -> None:
        chance, size = self._chance, self._chance.choice(_SIZES)
        stack = tuple(
            AdapterRef(f"lora{i}", chance.choice((0.0, 0.5, 1.0)))
            for i in chance.sample(range(_LORAS), chance.choice((0, 0, 1, 2)))
        )
        request = GenerationRequest(
            id=f"r{number}",
            prompt=new_prompt(),
            size=size,
            rendered_size=size,
            sampling=SamplingParams(
                chance.randint(1, 6),
                chance.uniform(1.0, 5.0),
                chance.choice(SAMPLER_NAMES),
                step_cache=chance.choice((0.0, 0.0, 0.2)),
            ),
            seed=number,
            n=chance.choice((1, 1, 1, 2)),
            adapters=stack,
            preview_every=chance.choice((0, 0, 0, 2)),
            priority=chance.choice((0, 0, 1)),
            negative_prompt=chance.choice((None, None, "a star")),
            tenant=chance.choice(("a", "b", "c")),
            checkpoint_every=chance.choice((0, 0, 0, 3)),
        )
        self._add(request, None)
        if number % 40 == 39:
            which = chance.randrange(_LORAS)
            self.engine.adapters.load(f"lora{which}", self._lora(which, seed=number))

    def step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, Checkpoint) and self._chance.random() < 0.5:
                request = self._running[event.request_id]
                again = replace(request, id=f"{request.id}+", checkpoint_every=0)
                if not request.adapters and again.id not in self.endings:
                    self._add(again, event.data)
            elif isinstance(event, Finished | Failed):
                if isinstance(event, Failed) and not isinstance(event.error, Cancelled):
                    raise RuntimeError(f"{event.request_id}: {event.error}")
                self.endings[event.request_id] += 1
                self._running.pop(event.request_id, None)
        if self._running and self._chance.random() < 0.2:
            self.engine.abort(self._chance.choice(sorted(self._running)))

    def resident_bytes(self) -> int:
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    def _add(self, request: GenerationRequest, checkpoint: bytes | None) -> None:
        self.engine.add(request, checkpoint=checkpoint)
        self.endings[request.id] = 0
        self._running[request.id] = request
        self.arrived += 1

    def _lora(self, which: int, seed: int) -> pathlib.Path:
        path = self._scratch / f"lora{which}-{seed}.safetensors"
        return save_random_lora(self._components.denoiser, path, seed=seed)
