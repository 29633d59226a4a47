"""The store of control adapters: files in, branches on the denoiser's device out.

Like `lora.adapter_store`, with fewer tiers: a branch is on the device, or it is read from its file
again. Called by the engine (acquire) and by its owner (load, unload, states).
"""

from __future__ import annotations

import logging
import pathlib
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from calotype.serving.core.errors import AdapterLoadFailed, EngineError, NotFound
from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.control.control_file import read_branch
from calotype.serving.engine.model.transformer import Transformer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """What is known of a name.

    Attributes:
        state: "loading", "ready", or the sentence that says why it failed.
        branch: the revision that serves, which is the last one that could be loaded; None where
            it left the device.
        on_its_way: a job of the loader for it is queued or runs.
        keep: it never leaves the device.
    """

    path: pathlib.Path
    revision: object
    state: str = "loading"
    branch: ControlBranch | None = None
    on_its_way: bool = False
    keep: bool = False


class ControlStore:
    """Control adapters by name, read in the background. Thread-safe.

    A new revision under a known name is loaded beside the old one, which serves until the new is
    ready, and for good if the new one cannot be loaded. Requests hold the branch they run with.

    Args:
        denoiser: the model that the adapters must fit.
        budget_bytes: memory for branches on the denoiser's device; None is no limit. The one used
            last stays whatever the budget.
    """

    def __init__(self, denoiser: Transformer, *, budget_bytes: int | None = None) -> None:
        self._config = denoiser.config
        parameter = next(denoiser.parameters())
        self._device = parameter.device
        self._dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16
        self._budget = budget_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently used first."""
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[tuple[str, _Entry]] = queue.SimpleQueue()
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

        Args:
            keep: it stays on the device for good.
            wait: seconds to wait for the outcome; None returns at once.

        Raises:
            AdapterLoadFailed: only with ``wait``: the file cannot be used, or took too long.
        """
        path = pathlib.Path(path)
        revision = _revision(path)
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or (entry.path, entry.revision) != (path, revision):
                old = None if entry is None else entry.branch
                entry = self._entries[name] = _Entry(path, revision, branch=old)
                self._request(name, entry)
            elif entry.state not in ("loading", "ready"):
                entry.state = "loading"
                self._request(name, entry)
            entry.keep = keep
            if wait is None:
                return
            self._changed.wait_for(lambda: self._state(name) != "loading", timeout=wait)
            state = self._state(name)
        if state == "loading":
            raise AdapterLoadFailed(f"{path} was not loaded within {wait} seconds.")
        if state != "ready":
            raise AdapterLoadFailed(state, param=str(path))

    def put(self, name: str, branch: ControlBranch) -> None:
        """Serves a branch that is in memory, for training and tests."""
        with self._changed:
            entry = _Entry(pathlib.Path(name), None, "ready", branch, keep=True)
            self._entries[name] = entry

    def unload(self, name: str) -> None:
        """Forgets a branch; requests that run with it keep it. Unknown names are no error."""
        with self._changed:
            self._entries.pop(name, None)
            self._changed.notify_all()

    def states(self) -> dict[str, str]:
        """Name to "loading", "ready", or a sentence that says why it failed."""
        with self._changed:
            return {name: self._state(name) for name in sorted(self._entries)}

    def resident_bytes(self) -> int:
        """Memory of all branches on the device."""
        with self._changed:
            return sum(_bytes(e.branch) for e in self._entries.values())

    def acquire(self, name: str) -> ControlBranch | None:
        """The branch on the device; None while it is on its way there.

        Raises:
            NotFound: no control adapter of this name was ever loaded.
            AdapterLoadFailed: its file cannot be used.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise unknown(name)
            self._entries.move_to_end(name)
            if entry.branch is not None:
                return entry.branch
            if entry.state not in ("loading", "ready"):
                raise AdapterLoadFailed(entry.state, param=str(entry.path))
            if not entry.on_its_way:
                self._request(name, entry)
            return None

    def wait_for_change(self, timeout: float) -> None:
        """Returns when a load ended, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def _state(self, name: str) -> str:
        entry = self._entries.get(name)
        return f"The adapter {name!r} was unloaded." if entry is None else entry.state

    def _request(self, name: str, entry: _Entry) -> None:
        entry.on_its_way = True
        self._jobs.put((name, entry))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="control-loader", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while True:
            name, entry = self._jobs.get()
            if self._entries.get(name) is not entry:
                continue  # unloaded or changed meanwhile; a newer job follows
            state, branch = "ready", None
            try:
                branch = read_branch(
                    entry.path, self._config, dtype=self._dtype, device=self._device
                )
            except EngineError as fault:
                state = fault.message
            except Exception as fault:
                # The loader must outlive any file; the cause is kept in the log and in the state.
                logger.exception("loading the control adapter %s failed", name)
                state = f"{entry.path} cannot be used as a control adapter: {fault}."
            with self._changed:
                entry.on_its_way = False
                entry.state = state
                if branch is not None:
                    entry.branch = branch
                    self._evict(keep=name)
                self._changed.notify_all()

    def _evict(self, keep: str) -> None:
        """Frees what was used longest ago until the budget holds; its file brings it back."""
        for name, entry in self._entries.items():
            held = sum(_bytes(e.branch) for e in self._entries.values())
            if self._budget is None or held <= self._budget:
                return
            if name != keep and not entry.keep and entry.state == "ready":
                entry.branch = None


def unknown(name: str) -> NotFound:
    return NotFound(f"There is no control adapter {name!r}.", param="controlnets")


def _bytes(branch: ControlBranch | None) -> int:
    if branch is None:
        return 0
    return sum(p.numel() * p.element_size() for p in branch.parameters())


def _revision(path: pathlib.Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
