"""One generator: a model on a device, its adapters, and the worker that draws with them.

`GeneratorReplica.configure` records what shall be served and returns at once; loading happens in
the background and `state` tells how far it is. A changed model is loaded beside the old one, which
goes on drawing until the new one is ready, and for good if the new one cannot be loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.config.environment import DATA_DIR
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.weights.sources import adapter_file, adapter_revision
from calotype.serving.worker.adapter_probe import AdapterProbe
from calotype.serving.worker.adapter_status import AdapterLoad, AdapterLoads
from calotype.serving.worker.engine_thread import EngineThread
from calotype.serving.worker.generation import GenerationWorker
from calotype.serving.worker.lease_source import LeaseSource
from calotype.serving.worker.model_loader import EngineState, LoadedModel, load_model
from calotype.serving.worker.prompt_source import PromptSource

if TYPE_CHECKING:
    from calotype.serving.engine.engine import Engine

log = logging.getLogger(__name__)

_LOADED: JsonObject = {
    "source": True,
    "precision": True,
    "device": True,
    "acceleration": {"compile": True, "devices_per_picture": True},
}
"""What of an ImageModel makes another engine; requests carry the rest."""

WATCH_SECONDS = 0.5
"""Longest pause between two looks at adapters that load; the engine wakes the looker sooner."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a replica is given by where it runs.

    Attributes:
        concurrency: jobs at once; more where a profile lets more of them share a step.
        on_lost: told, from any thread, when a device that draws along is gone: only another
            process can draw then.
    """

    name: str
    torch_threads: int | None = 1
    concurrency: int = 8
    drain_seconds: float = 300.0
    check_retries: CheckRetries = field(default_factory=CheckRetries)
    on_lost: Callable[[str], None] = lambda reason: None


@dataclass(frozen=True, slots=True)
class GeneratorState:
    """What a replica says of itself."""

    replica: str
    ready: bool
    message: str
    """What keeps it from drawing as it should; "" = nothing."""
    busy: int
    """Jobs that it draws."""
    engine: EngineState | None
    """How it draws; None while it loads."""
    adapters: Mapping[str, str]
    """Name -> ``loading``, ``ready`` or why not."""
    loads: Mapping[str, AdapterLoad]


@dataclass(slots=True)
class _Serving:
    """A loaded model at work."""

    key: str
    loaded: LoadedModel
    engine: EngineThread
    worker: GenerationWorker
    task: asyncio.Task[None]
    probe: AdapterProbe


class GeneratorReplica:
    def __init__(
        self,
        settings: ReplicaSettings,
        leases: LeaseSource,
        prompts: PromptSource,
        safety: SafetyStage,
        blobs: BlobStore,
    ) -> None:
        self.settings = settings
        self._leases, self._prompts, self._safety, self._blobs = leases, prompts, safety, blobs
        self._wanted: tuple[ImageModel, tuple[LoRAAdapter, ...]] | None = None
        self._serving: _Serving | None = None
        self._problem = ""
        self._loads = AdapterLoads()
        self._watching: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._converge_forever())
        self._retiring: set[asyncio.Task[None]] = set()

    def configure(self, model: ImageModel, adapters: Sequence[LoRAAdapter]) -> None:
        """Records the desired state."""
        mine = tuple(a for a in adapters if a.spec.model_ref.name == model.name)
        self._wanted = (model, mine)
        self._want(mine)
        self._changed.set()

    def state(self) -> GeneratorState:
        serving = self._serving
        if serving is not None:
            self._loads.observe(_states(serving.engine.engine))
        return GeneratorState(
            replica=self.settings.name,
            ready=serving is not None and self.healthy,
            message=self._problem,
            busy=serving.worker.busy if serving is not None else 0,
            engine=serving.loaded.state() if serving is not None else None,
            adapters=self._loads.texts(),
            loads=self._loads.snapshot(),
        )

    @property
    def healthy(self) -> bool:
        """False when the engine's thread, a device or the work is gone and only a restart helps."""
        serving = self._serving
        if serving is None:
            return True
        task = serving.task
        failed = task.done() and not task.cancelled() and task.exception() is not None
        return serving.engine.alive and not serving.loaded.lost and not failed

    async def close(self) -> None:
        """Drains: lets running jobs finish for a while, gives the rest back."""
        self._task.cancel()
        for task in (self._watching, self._probing):
            if task is not None:
                task.cancel()
        if self._serving is not None:
            await self._retire(self._serving)
            self._serving = None
        await asyncio.gather(*self._retiring)

    async def _converge_forever(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._wanted is None:
                continue
            model, adapters = self._wanted
            try:
                await self._serve(model)
                self._problem = ""
            except CalotypeError as error:
                self._problem = error.message
                log.error("%s", error.message)
            except Exception as error:  # the old model, if any, goes on; the state says why
                self._problem = f"The model could not be loaded: {type(error).__name__}: {error}."
                log.exception("loading %s failed", model.name)
            try:
                await self._load_adapters(adapters)
            except Exception as error:  # those that are loaded serve on
                self._problem = f"Adapters could not be loaded: {type(error).__name__}: {error}."
                log.exception("loading the adapters of %s failed", model.name)

    async def _serve(self, model: ImageModel) -> None:
        key = model.spec.model_dump_json(include=_LOADED)
        old = self._serving
        if old is not None and old.key == key:
            return
        if old is not None and old.loaded.group is not None:
            # Its devices hold no second model, and a process joins one group at a time.
            self._serving = None
            await self._retire(old)
            old = None
        loaded = await asyncio.to_thread(
            load_model,
            model,
            torch_threads=self.settings.torch_threads,
            data_folder=pathlib.Path(os.environ.get(DATA_DIR) or "calotype-data"),
            on_lost=self.settings.on_lost,
        )
        engine = EngineThread(loaded.engine)
        worker = GenerationWorker(
            self.settings.name,
            engine,
            self._leases,
            self._prompts,
            self._safety,
            self._blobs,
            concurrency=max(self.settings.concurrency, loaded.rows),
            check_retries=self.settings.check_retries,
            adapter_state=self._adapter_state,
        )
        self._loads = AdapterLoads()  # of this engine: it has loaded nothing yet
        probe = AdapterProbe(engine, model, self._prompts, self._safety)
        drawing = asyncio.create_task(worker.run())
        self._serving = _Serving(key, loaded, engine, worker, drawing, probe)
        if old is not None:
            retiring = asyncio.create_task(self._retire(old))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, serving: _Serving) -> None:
        if serving.engine.alive and not serving.loaded.lost:
            await serving.worker.drain(self.settings.drain_seconds)
        else:
            await serving.worker.abandon()
        serving.task.cancel()
        await asyncio.gather(serving.task, return_exceptions=True)
        await asyncio.to_thread(serving.engine.close)
        await asyncio.to_thread(serving.loaded.close)

    async def _load_adapters(self, adapters: Sequence[LoRAAdapter]) -> None:
        if self._serving is None:
            return
        self._want(adapters)
        if self._probing is not None:
            self._probing.cancel()
        probe, engine = self._serving.probe, self._serving.engine.engine
        unproved: list[tuple[LoRAAdapter, pathlib.Path]] = []
        for adapter in adapters:
            try:
                file = await asyncio.to_thread(adapter_file, adapter)
                unproven = probe.wanted(adapter, file)
            except (CalotypeError, OSError) as error:
                self._loads.refuse(adapter.name, str(error))
                log.error("%s", error)
                continue
            if unproven:
                unproved.append((adapter, file))
            else:
                self._hand(engine, adapter, file)
        for store, kind in ((engine.adapters, "lora"), (engine.controls, "control")):
            wanted = {adapter.name for adapter in adapters if adapter.spec.type == kind}
            for name in set(store.states()) - wanted:
                store.unload(name)
        self._watch(engine)
        self._probing = asyncio.create_task(self._probe(probe, engine, unproved))

    def _hand(self, engine: Engine, adapter: LoRAAdapter, file: pathlib.Path) -> None:
        store = engine.controls if adapter.spec.type == "control" else engine.adapters
        store.load(adapter.name, file, keep=adapter.spec.preload == "Always")
        self._loads.asked(adapter.name)

    async def _probe(
        self,
        probe: AdapterProbe,
        engine: Engine,
        unproved: Sequence[tuple[LoRAAdapter, pathlib.Path]],
    ) -> None:
        """Draws one probe after the other; what serves meanwhile is the revision before."""
        for adapter, file in unproved:
            try:
                problem = await probe.problem_of(adapter, file)
            except Exception as error:  # the next adapters are probed all the same
                log.exception("the probe of the adapter %s failed", adapter.name)
                problem = f"spec.probe was not drawn: {type(error).__name__}: {error}."
            if problem:
                self._loads.refuse(adapter.name, problem)
                log.error("adapter %s: %s", adapter.name, problem)
            else:
                self._hand(engine, adapter, file)
                self._watch(engine)

    def _watch(self, engine: Engine) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(_watch(engine, self._loads))

    def _adapter_state(self, name: str) -> str | None:
        """What a job is told that needs an adapter; None where this replica shall not have it."""
        wanted = () if self._wanted is None else self._wanted[1]
        if all(adapter.name != name for adapter in wanted):
            return None
        return self._loads.texts().get(name, "loading")

    def _want(self, adapters: Sequence[LoRAAdapter]) -> None:
        self._loads.keep(adapter.name for adapter in adapters)
        for adapter in adapters:
            self._loads.want(adapter.name, adapter_revision(adapter))


async def _watch(engine: Engine, loads: AdapterLoads) -> None:
    """Notes when each adapter is loaded, so that the time it took is true."""
    while loads.observe(_states(engine)):
        loading = "loading" in engine.controls.states().values()
        store = engine.controls if loading else engine.adapters
        await asyncio.to_thread(store.wait_for_change, WATCH_SECONDS)


def _states(engine: Engine) -> dict[str, str]:
    """LoRAs and control adapters: "loading", "ready", or why not."""
    return {**engine.adapters.states(), **engine.controls.states()}
