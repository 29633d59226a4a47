"""One fetch from order to receipt: resolve, bring here, check, put in its place.

A revision's folder appears when it is whole and checked, never before. A fetch that was stopped
goes on where it was; a fetch that was done before finds its receipt and does nothing again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calotype.serving.config import MergedModel, MergeSource, ModelSource
from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed, StorageFailed
from calotype.serving.weights.archive import unpack
from calotype.serving.weights.merging.merged_source import merged_folder
from calotype.serving.weights.resolving import Resolved, is_model_file, resolving
from calotype.serving.weights.sources import source_folder
from calotype.serving.weights.transfer import Budget, LocalFile, fetch_file
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed, volume_failed
from calotype.serving.wire.fetch_order import FetchOrder

if TYPE_CHECKING:
    from calotype.serving.weights.checking import CheckedAdapter

RECEIPT = ".fetched.json"
RESUMABLE = frozenset({Fault.UNREACHABLE, Fault.VOLUME_FULL, Fault.VOLUME_FAILED})
"""Faults after which what is here already is worth keeping."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is on the volume now."""

    revision: str
    sha256: str
    """Of an adapter's file; of a model all digests and names of its files."""
    size_bytes: int
    path: pathlib.Path
    rank: int | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One line of a receipt."""

    name: str
    size: int
    sha256: str


def run_order(order: FetchOrder, say: Callable[[str], None]) -> Fetched:
    """Does what fetch.json says.

    Args:
        say: where sentences about the progress go.

    Raises:
        FetchFailed: there are no weights that could be served; says why.
    """
    folder = order.folder
    merge = order.source.merge if isinstance(order.source, ModelSource) else None
    if merge is not None and order.kind == "model":
        return _merge(order, merge, say)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), resolving(order) as resolved:
            staging = folder / f".fetch-{_fingerprint(order, resolved)}"
            _tidy(folder, staging)
            target = _stored(folder, resolved)
            if target is not None:
                say(f"The {order.kind} {order.name} is on the volume already.")
                # Checked again: the model that it is for may have changed.
                return _fetched(order, target, _check(order, target, _receipt(target)))
            say(f"Fetching the {order.kind} {order.name}: {len(resolved.files)} files.")
            return _bring(order, resolved, staging)
    except OSError as error:
        raise volume_failed(error, str(folder)) from error


def _merge(order: FetchOrder, merge: MergeSource, say: Callable[[str], None]) -> Fetched:
    """Fetches what is merged, and merges it beside it."""

    def bring(one: MergedModel) -> pathlib.Path:
        source, http = one.source, one.source.http
        if source.built_in is not None or source.path is not None:
            return source_folder(source, order.name)
        name = f"{order.name}-input-{merge.models.index(one) + 1}"
        pin = None if http is None else http.sha256
        return run_order(
            order.model_copy(update={"name": name, "source": source, "sha256": pin}), say
        ).path

    try:
        target = merged_folder(merge, order.folder, bring, say)
        receipt = _receipt(target)
        if not receipt:
            files = sorted(path for path in target.rglob("*") if path.is_file())
            receipt = [
                StoredFile(str(path.relative_to(target)), path.stat().st_size, _digest(path))
                for path in files
            ]
            _check(order, target, receipt)
            _write_receipt(target, receipt)
    except InvalidRequest as error:
        conflict = error.code == "licence_conflict"
        fault = Fault.LICENCE_NOT_ALLOWED if conflict else Fault.SOURCE_INVALID
        raise failed(fault, error.message) from None
    except ModelLoadFailed as error:
        raise failed(Fault.MODEL_INCOMPLETE, error.message) from None
    except StorageFailed as error:
        raise failed(Fault.VOLUME_FULL, error.message) from None
    except OSError as error:
        raise volume_failed(error, str(order.folder)) from error
    return _fetched(order, target, None)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Two fetches of one object go one after the other."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint(order: FetchOrder, resolved: Resolved) -> str:
    """Of these very files: what is there of another version is of no use."""
    wanted = [order.source.model_dump(mode="json"), order.sha256, resolved.revision]
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def _tidy(folder: pathlib.Path, staging: pathlib.Path) -> None:
    """Removes what fetches of other sources left half done."""
    for left in folder.glob(".fetch-*"):
        if left != staging:
            shutil.rmtree(left, ignore_errors=True)


def _stored(folder: pathlib.Path, resolved: Resolved) -> pathlib.Path | None:
    """The folder of this revision, if it is whole."""
    if resolved.revision is None:
        return None
    target = folder / resolved.revision
    receipt = _receipt(target)
    if not receipt:
        return None
    for file in receipt:
        path = target / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return None
    return target


def _bring(order: FetchOrder, resolved: Resolved, staging: pathlib.Path) -> Fetched:
    budget = Budget(order.max_bytes)
    known = [file.size for file in resolved.files if file.size is not None]
    budget.check(sum(known), f"The {order.kind} {order.name}")
    try:
        files = [fetch_file(file, staging, budget) for file in resolved.files]
        revision = resolved.revision or files[0].sha256
        if resolved.archive:
            files = _unpacked(files[0], staging, order)
        lines = [StoredFile(str(f.path.relative_to(staging)), f.size, f.sha256) for f in files]
        checked = _check(order, staging, lines)
    except FetchFailed as error:
        if error.code not in RESUMABLE:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    _write_receipt(staging, lines)
    target = order.folder / revision
    if target.exists():
        shutil.rmtree(target)  # not whole, or it would have been taken
    os.replace(staging, target)
    return _fetched(order, target, checked)


def _unpacked(archive: LocalFile, staging: pathlib.Path, order: FetchOrder) -> list[LocalFile]:
    content = staging / "content"
    unpack(archive.path, content, is_model_file, Budget(order.max_bytes))
    archive.path.unlink()
    for entry in content.iterdir():
        os.replace(entry, staging / entry.name)
    content.rmdir()
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    return [LocalFile(path, path.stat().st_size, _digest(path)) for path in paths]


def _check(
    order: FetchOrder, folder: pathlib.Path, files: Sequence[StoredFile]
) -> CheckedAdapter | None:
    """The engine's checks; imports torch, so only now.

    Raises:
        FetchFailed: a replica could not load it, or the digest is not the pinned one.
    """
    from calotype.serving.weights.checking import (
        check_adapter,
        check_control,
        check_model,
    )

    Budget(order.max_bytes).check(sum(f.size for f in files), f"The {order.kind} {order.name}")
    if order.kind == "adapter":
        if order.sha256 and files[0].sha256 != order.sha256:
            raise failed(
                Fault.CHECKSUM_MISMATCH,
                f"{files[0].name} has the sha256 {files[0].sha256}, but the manifest pins "
                f"{order.sha256}.",
            )
        base = order.base_model()
        if order.adapter_type == "control":
            return check_control(folder / files[0].name, base)
        most = order.max_rank or base.spec.adapters.max_rank
        return check_adapter(folder / files[0].name, base, most)
    check_model(folder)
    digest = _digest_of(files)
    if order.sha256 and order.source.http is None and digest != order.sha256:
        raise failed(
            Fault.CHECKSUM_MISMATCH,
            f"The files of {order.name} have the sha256 {digest} together, but the manifest pins "
            f"{order.sha256}.",
        )
    return None


def _fetched(order: FetchOrder, target: pathlib.Path, checked: CheckedAdapter | None) -> Fetched:
    files = _receipt(target)
    size = sum(file.size for file in files)
    if checked is None:
        return Fetched(target.name, _digest_of(files), size, target)
    file = files[0]
    modules = tuple(checked.target_modules)
    return Fetched(target.name, file.sha256, size, target / file.name, checked.rank, modules)


def _digest_of(files: Sequence[StoredFile]) -> str:
    """One digest of many files: of their digests and names, in order."""
    text = "\n".join(f"{f.sha256}  {f.name}" for f in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _receipt(folder: pathlib.Path) -> list[StoredFile]:
    """Empty where there is none."""
    try:
        lines: list[Any] = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        return [StoredFile(**line) for line in lines]
    except (OSError, ValueError, TypeError):
        return []


def _write_receipt(folder: pathlib.Path, files: Sequence[StoredFile]) -> None:
    with (folder / RECEIPT).open("w", encoding="utf-8") as file:
        json.dump([asdict(line) for line in files], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
