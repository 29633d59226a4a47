"""The processes that draw each image together with this one, a device each.

`DeviceGroup` starts them, hands them orders through their standard input, and notices when one is
gone. They end with this process, however it ends. See `parallel` for what they compute.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO

import torch
import torch.distributed as dist

from calotype.serving.core.errors import GroupLost, ModelLoadFailed
from calotype.serving.engine.model.components import Precision
from calotype.serving.engine.parallel.sequence_parallel import Order, SequenceGroup

logger = logging.getLogger(__name__)

MEETING_SECONDS = 600.0
"""How long the ranks wait for each other, in the middle of a step too."""
_SHUTDOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What one process of a group is told when it starts; the first line that it reads, as JSON.

    Attributes:
        folder: of the model.
        device: of this rank, ``cpu`` or ``cuda:N``.
        meeting: file by which the ranks find each other.
        torch_threads: None leaves torch's own choice.
        max_rank: highest LoRA rank that is loaded.
        adapter_bytes: device memory for adapters; None is no limit.
    """

    rank: int
    size: int
    folder: str
    device: str
    precision: Precision
    meeting: str
    torch_threads: int | None
    max_rank: int
    adapter_bytes: int | None


class DeviceGroup:
    """Rank 0's side of a group; only one can be joined in a process at a time.

    Args:
        folder: of the model, which every rank loads whole.
        size: processes, this one included.
        device: ``cpu``, or ``cuda`` for the first ``size`` CUDA devices that this process sees.
        on_lost: called once, from any thread, when the group can draw no more; told why.

    Raises:
        ModelLoadFailed: there are not so many devices.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        size: int,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        torch_threads: int | None = None,
        max_rank: int = 256,
        adapter_bytes: int | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        _check_devices(size, device)
        self.size = size
        self._cuda = device != "cpu"
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._over = False
        self._joined = False
        self.lost = ""
        """Why the group can draw no more; empty while it can."""
        self._place = pathlib.Path(tempfile.mkdtemp(prefix="calotype-group-"))
        self._followers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, size):
                own = f"cuda:{rank}" if self._cuda else "cpu"
                settings = RankSettings(
                    *(rank, size, str(folder), own, precision, str(self._place / "meeting")),
                    *(torch_threads, max_rank, adapter_bytes),
                )
                self._followers.append(_started(settings))
        except OSError as error:
            self.close()
            raise ModelLoadFailed(f"The processes of a group cannot be started: {error}.") from None

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes, in the order of their ranks."""
        return [process.pid for process in self._followers]

    def join(self) -> SequenceGroup:
        """Waits until all ranks have loaded the model; the group for `engine.Engine`.

        Raises:
            ModelLoadFailed: one of them could not load it, or they do not find each other.
        """
        for rank, process in enumerate(self._followers, 1):
            said = _out(process).readline().decode(errors="replace").strip()
            if said != "ready":
                why = said or f"its process ended with {process.wait()}"
                raise ModelLoadFailed(f"Device {rank + 1} of {self.size} cannot be used: {why}")
        try:
            meet(str(self._place / "meeting"), 0, self.size, self._cuda)
        except (RuntimeError, ValueError) as error:
            raise ModelLoadFailed(f"The devices of a group do not meet: {error}.") from error
        self._joined = True
        for rank, process in enumerate(self._followers, 1):
            threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True
            ).start()
        return SequenceGroup(self._tell, self._lose)

    def close(self) -> None:
        """Ends the other processes; nothing may be drawn any more."""
        with self._lock:
            self._over = True
        for process in self._followers:
            with contextlib.suppress(OSError):  # it is dead and had not read everything
                _in(process).close()
        for process in self._followers:
            try:
                process.wait(_SHUTDOWN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _out(process).close()
        if self._joined:
            self._joined = False
            # The others are gone, so whatever it says of them is no news.
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        shutil.rmtree(self._place, ignore_errors=True)

    def _tell(self, order: Order) -> None:
        data = pickle.dumps(order)
        for rank, process in enumerate(self._followers, 1):
            try:
                _in(process).write(data)
                _in(process).flush()
            except (OSError, ValueError):
                self._lose(f"the process of device {rank + 1} is gone")
                raise GroupLost(
                    f"Device {rank + 1} of {self.size} does not draw any more."
                ) from None

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._lose(f"the process of device {rank + 1} of {self.size} ended with {code}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over, self.lost = True, reason
        logger.error("a picture cannot be shared between devices any more: %s", reason)
        # One rank without the others is of no use, and may wait for them for ever.
        for process in self._followers:
            with contextlib.suppress(OSError):
                process.kill()
        self._on_lost(reason)


def meet(meeting: str, rank: int, size: int, cuda: bool) -> None:
    """Makes torch's default process group; all ranks call it at once.

    Raises:
        RuntimeError, ValueError: they do not find each other, or there is such a group already.
    """
    if cuda:
        torch.cuda.set_device(rank)
    else:
        # All ranks are on this machine, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=MEETING_SECONDS),
    )


def _started(settings: RankSettings) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "calotype.serving.engine.parallel.follower"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C at a terminal is for the process that drains; this one ends with it.
        start_new_session=True,
    )
    _in(process).write(json.dumps(asdict(settings)).encode() + b"\n")
    _in(process).flush()
    return process


def _check_devices(size: int, device: str) -> None:
    if device == "cpu":
        return
    seen = torch.cuda.device_count()
    if seen < size:
        raise ModelLoadFailed(
            f"acceleration.devicesPerPicture is {size}, but this replica sees {seen} CUDA "
            f"device{'' if seen == 1 else 's'}: lower it, or name a resourceProfile with more.",
            param="devices_per_picture",
        )


def _in(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _out(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout
