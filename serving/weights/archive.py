"""A model's folder out of a tar archive, without trusting a single entry of it."""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Callable

from calotype.serving.weights.transfer import PIECE_BYTES, Budget
from calotype.serving.wire.fetch_faults import Fault, failed, volume_failed

MAX_ENTRIES = 10_000


def unpack(
    archive: pathlib.Path, folder: pathlib.Path, wanted: Callable[[str], bool], budget: Budget
) -> None:
    """Writes the wanted files below ``folder``; one folder around all of them is taken off.

    Args:
        wanted: says by a path inside the model whether it is part of it.

    Raises:
        FetchFailed: it is no tar archive, is damaged, too large, or has no such files.
    """
    try:
        with tarfile.open(archive) as tar:
            members = [m for m, _ in zip(tar, range(MAX_ENTRIES), strict=False) if m.isfile()]
            top = _top([member.name for member in members])
            found = 0
            for member in members:
                name = member.name.removeprefix("./").removeprefix(top)
                parts = pathlib.PurePosixPath(name).parts
                if ".." in parts or name.startswith("/") or not wanted(name):
                    continue
                found += 1
                _write(tar, member, folder / name, budget)
    except (tarfile.TarError, EOFError) as error:
        raise failed(
            Fault.SOURCE_INVALID, f"The download is no tar archive, or a damaged one ({error})."
        ) from None
    except OSError as error:
        raise volume_failed(error, str(folder)) from error
    if not found:
        raise failed(
            Fault.MODEL_INCOMPLETE,
            "The archive holds no model_index.json and no weights of a diffusers-format folder.",
        )


def _top(names: list[str]) -> str:
    """``name/`` where every entry lies in one folder that holds model_index.json, else nothing."""
    indexes = [n.removeprefix("./") for n in names if n.rpartition("/")[2] == "model_index.json"]
    shortest = min(indexes, key=lambda name: name.count("/"), default="")
    return shortest.removesuffix("model_index.json")


def _write(
    tar: tarfile.TarFile, member: tarfile.TarInfo, target: pathlib.Path, budget: Budget
) -> None:
    budget.check(member.size, "The content of the archive")
    source = tar.extractfile(member)
    if source is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as file:
        while piece := source.read(PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    budget.taken += member.size
