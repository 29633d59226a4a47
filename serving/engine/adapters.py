"""The store of LoRA adapters: files in, checked and ready weights out.

Called by the engine (acquire, release) and by its owner (load, unload, states). How loaded adapters
act on a batch is `lora_layers`; what a file must look like is `lora_file`.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from calotype.serving.engine.lora_file import LoraLayer, linear_shapes, read_lora
from calotype.serving.engine.lora_layers import Adapter, LoraLayers
from calotype.serving.errors import AdapterLoadFailed, EngineError, NotFound

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    path: pathlib.Path
    revision: object
    state: str = "loading"
    """"loading", "ready", "evicted", or the sentence that says why it failed."""
    adapter: Adapter | None = None


class AdapterStore:
    """Adapters by name: loaded in the background, least recently used dropped above a budget.

    Thread-safe. A dropped adapter stays known and is read again when a request needs it; a new
    revision under a known name is loaded beside the old one, which serves until the new is ready.

    Args:
        denoiser: the model that the adapters must fit.
        max_rank: highest rank that is accepted.
        budget_bytes: memory for adapter weights; None is no limit. Adapters in use by running
            requests are kept whatever the budget.
    """

    def __init__(
        self, denoiser: torch.nn.Module, *, max_rank: int = 64, budget_bytes: int | None = None
    ) -> None:
        self.layers = LoraLayers(denoiser)
        self._shapes = linear_shapes(denoiser)
        parameter = next(denoiser.parameters())
        self._device = parameter.device
        self._dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16
        self._max_rank = max_rank
        self._budget = budget_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._pins: dict[int, int] = {}
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[tuple[str, pathlib.Path, object]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def load(self, name: str, path: pathlib.Path | str, *, wait: float | None = None) -> None:
        """Loads a file under a name, in the background; does nothing if it is loaded already.

        A file that changed, or another path, is a new revision. Look at `states` for the outcome.

        Args:
            wait: seconds to wait for the outcome; None returns at once.

        Raises:
            AdapterLoadFailed: only with ``wait``: the file cannot be used, or took too long.
        """
        path = pathlib.Path(path)
        revision = _revision(path)
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or (entry.path, entry.revision) != (path, revision):
                old = None if entry is None else entry.adapter
                self._entries[name] = _Entry(path, revision, adapter=old)
                self._request(name, path, revision)
            elif entry.state not in ("loading", "ready", "evicted"):
                entry.state = "loading"
                self._request(name, path, revision)
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
            if entry is not None and entry.adapter is not None:
                self.layers.forget(entry.adapter)
            self._changed.notify_all()

    def states(self) -> dict[str, str]:
        """Name to "loading", "ready", or a sentence that says why it failed."""
        with self._changed:
            return {name: self._state(name) for name in sorted(self._entries)}

    def resident_bytes(self) -> int:
        """Memory of all adapters in the store."""
        with self._changed:
            return self._resident()

    def acquire(self, name: str) -> Adapter | None:
        """The adapter, pinned until `release`; None while it is loading.

        Raises:
            NotFound: no adapter of this name was ever loaded.
            AdapterLoadFailed: its file cannot be used.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise NotFound(f"There is no LoRA adapter {name!r}.", param="loras")
            if entry.adapter is not None:
                self._entries.move_to_end(name)
                self._pins[id(entry.adapter)] = self._pins.get(id(entry.adapter), 0) + 1
                return entry.adapter
            if entry.state == "evicted":
                entry.state = "loading"
                self._request(name, entry.path, entry.revision)
            if entry.state == "loading":
                return None
            raise AdapterLoadFailed(entry.state, param=str(entry.path))

    def release(self, adapter: Adapter) -> None:
        """Takes back one `acquire`."""
        with self._changed:
            left = self._pins.get(id(adapter), 0) - 1
            if left > 0:
                self._pins[id(adapter)] = left
                return
            self._pins.pop(id(adapter), None)
            if all(entry.adapter is not adapter for entry in self._entries.values()):
                self.layers.forget(adapter)
            self._evict()

    def wait_for_change(self, timeout: float) -> None:
        """Returns when a load ended, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def _state(self, name: str) -> str:
        entry = self._entries.get(name)
        if entry is None:
            return f"The adapter {name!r} was unloaded."
        return "ready" if entry.state == "evicted" else entry.state

    def _request(self, name: str, path: pathlib.Path, revision: object) -> None:
        self._jobs.put((name, path, revision))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while True:
            name, path, revision = self._jobs.get()
            loaded: Adapter | None = None
            state = "ready"
            try:
                layers = read_lora(path, self._shapes, max_rank=self._max_rank, dtype=self._dtype)
                moved = {k: _moved(la, self._device) for k, la in layers.items()}
                loaded = Adapter(name, moved, _digest(path))
            except EngineError as fault:
                state = fault.message
            except Exception as fault:
                # The loader must outlive any file; the cause is kept in the log and in the state.
                logger.exception("loading the adapter %s failed", name)
                state = f"{path} cannot be used as an adapter: {fault}."
            with self._changed:
                entry = self._entries.get(name)
                if entry is not None and (entry.path, entry.revision) == (path, revision):
                    old, entry.state = entry.adapter, state
                    if loaded is not None:
                        entry.adapter = loaded
                        self._entries.move_to_end(name)
                        if old is not None:
                            self.layers.forget(old)
                        self._evict(keep=name)
                    self._changed.notify_all()

    def _resident(self) -> int:
        return sum(e.adapter.size for e in self._entries.values() if e.adapter is not None)

    def _evict(self, keep: str | None = None) -> None:
        if self._budget is None:
            return
        for name, entry in list(self._entries.items()):
            if self._resident() <= self._budget:
                return
            adapter = entry.adapter
            if name == keep or adapter is None or id(adapter) in self._pins:
                continue
            self.layers.forget(adapter)
            entry.adapter = None
            if entry.state == "ready":
                entry.state = "evicted"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _moved(layer: LoraLayer, device: torch.device) -> LoraLayer:
    return LoraLayer(layer.down.to(device), layer.up.to(device))


def _revision(path: pathlib.Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
