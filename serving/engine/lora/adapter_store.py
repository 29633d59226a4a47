"""The store of LoRA adapters: files in, checked and ready weights out.

An adapter lies on disk, in the CPU's memory, or there and on the denoiser's device. Each of the two
memories has a budget of bytes; what was used longest ago leaves first. Called by the engine
(acquire, release) and by its owner (load, unload, states). How loaded adapters act on a batch is
`lora_layers`; what a file must look like is `lora_file`.
"""

from __future__ import annotations

import logging
import pathlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from calotype.serving.core.errors import AdapterLoadFailed, EngineError, NotFound
from calotype.serving.engine.lora.dora import with_gains
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.lora.lora_layers import Adapter, LoraLayers
from calotype.serving.engine.lora.low_rank import LoraLayer
from calotype.serving.engine.lora.model_fit import MAX_RANK, Coverage
from calotype.serving.engine.sizing.weight_header import file_digest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Loaded:
    """One revision of an adapter in memory; ``host`` are its factors on the CPU."""

    adapter: Adapter
    host: dict[str, LoraLayer] | None
    coverage: Coverage


@dataclass(slots=True)
class _Entry:
    """What is known of a name.

    Attributes:
        state: "loading", "ready", or the sentence that says why it failed.
        loaded: the revision that serves, which is the last one that could be loaded.
        on_its_way: a job of the loader for it is queued or runs.
        keep: it never leaves the device.
    """

    path: pathlib.Path
    revision: object
    state: str = "loading"
    loaded: _Loaded | None = None
    on_its_way: bool = field(default=False)
    keep: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """Where an adapter is: ``tier`` is "device", "cpu" or "disk".

    Attributes:
        coverage: how much of the model it changes; None before it was loaded.
    """

    tier: str
    bytes: int
    digest: str
    coverage: Coverage | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """Something for the loader; ``back`` brings back what was loaded before."""

    name: str
    path: pathlib.Path
    revision: object
    back: bool


class AdapterStore:
    """Adapters by name, read in the background.

    Thread-safe. A dropped adapter stays known and is brought back when a request needs it; a new
    revision under a known name is loaded beside the old one, which serves until the new is ready,
    and for good if the new one cannot be loaded.

    Args:
        denoiser: the model that the adapters must fit.
        max_rank: highest rank that is accepted.
        budget_bytes: memory for adapters on the denoiser's device; None is no limit. Adapters in
            use by running requests are kept whatever the budget.
        cpu_budget_bytes: likewise for their copies in the CPU's memory, from which they come back
            to the device without reading the disk.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        *,
        max_rank: int = MAX_RANK,
        budget_bytes: int | None = None,
        cpu_budget_bytes: int | None = None,
    ) -> None:
        self.layers = LoraLayers(denoiser)
        self._denoiser = denoiser
        self._shapes = linear_shapes(denoiser)
        parameter = next(denoiser.parameters())
        self._device = parameter.device
        self._dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16
        self._max_rank = max_rank
        self._budget, self._cpu_budget = budget_bytes, cpu_budget_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently used first."""
        self._pins: dict[int, int] = {}
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def load(
        self,
        name: str,
        path: pathlib.Path | str,
        *,
        keep: bool = False,
        wait: float | None = None,
    ) -> None:
        """Loads a file under a name, in the background; does nothing if it is loaded already.

        A file that changed, or another path, is a new revision. Look at `states` for the outcome.

        Args:
            keep: it stays on the device for good; those that are kept must fit there together.
            wait: seconds to wait for the outcome; None returns at once.

        Raises:
            AdapterLoadFailed: only with ``wait``: the file cannot be used, or took too long.
        """
        path = pathlib.Path(path)
        revision = _revision(path)
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or (entry.path, entry.revision) != (path, revision):
                old = None if entry is None else entry.loaded
                entry = self._entries[name] = _Entry(path, revision, loaded=old)
                self._request(name, entry, back=False)
            elif entry.state not in ("loading", "ready") or (keep and not entry.keep):
                entry.state = "loading"
                self._request(name, entry, back=False)
            entry.keep = keep
            if wait is None:
                return
            self._changed.wait_for(lambda: self._state(name) != "loading", timeout=wait)
            state = self._state(name)
        if state == "loading":
            raise AdapterLoadFailed(f"{path} was not loaded within {wait} seconds.")
        if state != "ready":
            raise AdapterLoadFailed(state, param=str(path))

    def unload(self, name: str) -> None:
        """Forgets an adapter; requests that run with it keep it. Unknown names are no error."""
        with self._changed:
            entry = self._entries.pop(name, None)
            if entry is not None and entry.loaded is not None:
                self._retire(entry.loaded.adapter)
            self._changed.notify_all()

    def states(self) -> dict[str, str]:
        """Name to "loading", "ready", or a sentence that says why it failed."""
        with self._changed:
            return {name: self._state(name) for name in sorted(self._entries)}

    def places(self) -> dict[str, AdapterPlace]:
        """Where every adapter is."""
        with self._changed:
            return {name: _place(entry.loaded) for name, entry in sorted(self._entries.items())}

    def resident_bytes(self) -> int:
        """Memory of all adapters on the device."""
        with self._changed:
            return self._on_device()

    def acquire(self, name: str) -> Adapter | None:
        """The adapter on the device, pinned until `release`; None while it is on its way there.

        Raises:
            NotFound: no adapter of this name was ever loaded.
            AdapterLoadFailed: its file cannot be used.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise NotFound(f"There is no LoRA adapter {name!r}.", param="loras")
            self._entries.move_to_end(name)
            loaded = entry.loaded
            if loaded is not None and loaded.adapter.layers is not None:
                key = id(loaded.adapter)
                self._pins[key] = self._pins.get(key, 0) + 1
                return loaded.adapter
            kept = loaded is not None and loaded.host is not None
            if entry.state not in ("loading", "ready") and not kept:
                raise AdapterLoadFailed(entry.state, param=str(entry.path))
            if not entry.on_its_way:
                self._request(name, entry, back=True)
            return None

    def release(self, adapter: Adapter) -> None:
        """Takes back one `acquire`."""
        with self._changed:
            left = self._pins.get(id(adapter), 0) - 1
            if left > 0:
                self._pins[id(adapter)] = left
                return
            self._pins.pop(id(adapter), None)
            if all(
                e.loaded is None or e.loaded.adapter is not adapter for e in self._entries.values()
            ):
                self._retire(adapter)
            self._evict()

    def wait_for_change(self, timeout: float) -> None:
        """Returns when a load ended, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def _state(self, name: str) -> str:
        entry = self._entries.get(name)
        return f"The adapter {name!r} was unloaded." if entry is None else entry.state

    def _request(self, name: str, entry: _Entry, *, back: bool) -> None:
        entry.on_its_way = True
        self._jobs.put(_Job(name, entry.path, entry.revision, back))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            with self._changed:
                entry = self._wanted(job)
                loaded = entry.loaded if entry is not None and job.back else None
            if entry is None:
                continue  # unloaded or changed meanwhile; a newer job follows
            state, arrived = "ready", None
            try:
                arrived = self._bring(job.name, job.path, loaded)
            except EngineError as fault:
                state = fault.message
            except Exception as fault:
                # The loader must outlive any file; the cause is kept in the log and in the state.
                logger.exception("loading the adapter %s failed", job.name)
                state = f"{job.path} cannot be used as an adapter: {fault}."
            with self._changed:
                self._arrived(job, state, arrived)

    def _wanted(self, job: _Job) -> _Entry | None:
        entry = self._entries.get(job.name)
        if entry is None or (entry.path, entry.revision) != (job.path, job.revision):
            return None
        return entry

    def _bring(self, name: str, path: pathlib.Path, loaded: _Loaded | None) -> _Loaded:
        """An adapter on the device, from the CPU's memory if it is there, else from its file."""
        if loaded is not None and loaded.host is not None:
            if loaded.adapter.layers is None:
                loaded.adapter.layers = _moved(loaded.host, self._device)
            return loaded
        file = read_lora(path, self._shapes, max_rank=self._max_rank, dtype=self._dtype)
        logger.info("the adapter %s (%s) changes %s", name, file.layout, file.coverage)
        host, digest = with_gains(file.layers, self._weight), file_digest(path)
        if loaded is not None and loaded.adapter.digest == digest:
            loaded.adapter.layers, loaded.host = _moved(host, self._device), host
            return loaded
        adapter = Adapter(name, _moved(host, self._device), str(path), digest)
        return _Loaded(adapter, host, file.coverage)

    def _weight(self, module: str) -> torch.Tensor:
        weight = self._denoiser.get_submodule(module).weight
        assert isinstance(weight, torch.nn.Parameter)
        # A magnitude is applied to what serves, also where torchao has made it eight bits.
        plain = type(weight.data) is torch.Tensor
        return weight.data if plain else weight.data.dequantize()

    def _arrived(self, job: _Job, state: str, loaded: _Loaded | None) -> None:
        entry = self._wanted(job)
        if entry is not None:
            entry.on_its_way = False
            # What comes back says nothing of a newer revision that could not be loaded.
            if not job.back or loaded is None:
                entry.state = state
            old = entry.loaded
            if loaded is not None:
                entry.loaded = loaded
                self._entries.move_to_end(job.name)
                if old is not None and old.adapter is not loaded.adapter:
                    self._retire(old.adapter)
                if entry.keep and (problem := self._too_much()):
                    entry.state, entry.keep = f"{job.path} {problem}", False
                self._evict(keep=job.name)
        self._changed.notify_all()

    def _retire(self, adapter: Adapter) -> None:
        """Frees the device of an adapter that no name stands for, unless rows still use it."""
        if id(adapter) not in self._pins:
            self.layers.forget(adapter)
            adapter.layers = None

    def _too_much(self) -> str:
        """The end of a sentence when the kept adapters do not fit on the device together."""
        kept = (e.loaded.adapter.size for e in self._entries.values() if e.keep and e.loaded)
        if self._budget is None or (total := sum(kept)) <= self._budget:
            return ""
        return (
            f"does not fit beside the other adapters with preload: Always: together they take "
            f"{total:,} bytes, and the model's adapters.memoryBudget is {self._budget:,}. Raise "
            "it, or set preload: OnDemand."
        )

    def _on_device(self) -> int:
        loaded = (e.loaded for e in self._entries.values() if e.loaded is not None)
        return sum(h.adapter.size for h in loaded if h.adapter.layers is not None)

    def _on_cpu(self) -> int:
        loaded = (e.loaded for e in self._entries.values() if e.loaded is not None)
        return sum(h.adapter.size for h in loaded if h.host is not None)

    def _evict(self, keep: str | None = None) -> None:
        loaded = [
            (e, e.loaded) for n, e in self._entries.items() if e.loaded is not None and n != keep
        ]
        for entry, one in loaded:
            if self._budget is None or self._on_device() <= self._budget:
                break
            pinned = id(one.adapter) in self._pins
            stays = pinned or entry.keep or not self._comes_back(entry, one.host)
            if one.adapter.layers is not None and not stays:
                self._retire(one.adapter)
        # Copies of what is on the device anyway are the cheapest to lose.
        for entry, one in sorted(loaded, key=lambda item: item[1].adapter.layers is None):
            if self._cpu_budget is None or self._on_cpu() <= self._cpu_budget:
                break
            if self._comes_back(entry, one.adapter.layers):
                one.host = None

    def _comes_back(self, entry: _Entry, elsewhere: object) -> bool:
        """Whether a copy may go: another one stays, or the file of this revision is still there."""
        return elsewhere is not None or entry.state == "ready"


def _place(loaded: _Loaded | None) -> AdapterPlace:
    if loaded is None:
        return AdapterPlace("disk", 0, "")
    on_device, on_cpu = loaded.adapter.layers is not None, loaded.host is not None
    tier = "device" if on_device else "cpu" if on_cpu else "disk"
    return AdapterPlace(tier, loaded.adapter.size, loaded.adapter.digest, loaded.coverage)


def _moved(layers: dict[str, LoraLayer], device: torch.device) -> dict[str, LoraLayer]:
    return {name: layer.to(device) for name, layer in layers.items()}


def _revision(path: pathlib.Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
