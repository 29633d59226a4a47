"""The audit log: one line per decision, hash-chained.

Append-only JSON lines. It holds what was decided and why, never a prompt or an image. Whoever
changes, removes or reorders a line breaks the chain from there on, which `verify` tells. Whoever
can write the file could make a whole new chain, or cut its end off: so its heads are handed to a
witness that keeps them signed elsewhere (`heads`), and `verify` compares the file with them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from calotype.moderation.documents import ReadOnlyJson
from calotype.moderation.errors import AuditError
from calotype.moderation.records.heads import Head

GENESIS = "0" * 64
KEPT = (
    *("id", "stage", "policy", "policy_sha256", "verdict", "categories", "scores", "peaks"),
    *("findings", "asked", "preset", "granted"),
)
"""What a line keeps of a decision; ``reason`` may hold paths and is left out."""
HEAD_LINES = 100
"""A head is handed over at the latest after so many lines."""
MOST_UNWITNESSED = 1000
"""Lines that may be written while the witness is away; after them nothing is decided any more."""

Witness = Callable[[Head], None]
"""Keeps a head where the writer cannot change it. May raise anything; the head is handed again."""


class AuditLog:
    """One writer's log. Thread-safe; every line is on the disk before `append` returns.

    Args:
        witness: is handed the head of the log; None = only the file tells of its lines.

    Raises:
        AuditError: another process writes this file, or it is no audit log.
        OSError: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path, witness: Witness | None = None) -> None:
        self.path, self._witness = path, witness
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise AuditError(
                f"{path}: another process writes this audit log; give each writer its own file."
            ) from None
        self._last, self._lines, self._size = _end_of(path)
        self._handed = self._tried = 0
        os.ftruncate(self._file, self._size)  # a half-written last line (power loss) is cut off

    def append(self, decision: ReadOnlyJson, digest: str | None = None) -> str:
        """Records a decision's payload and returns the line's hash.

        Args:
            digest: keyed digest of what was checked (`vault.PromptVault.digest`).

        Raises:
            OSError: it is not recorded, and the log is as it was: the disk is full, somebody else
                changed the file, or the witness has been away for too long.
        """
        kept = {name: decision[name] for name in KEPT if name in decision}
        with self._lock:
            self._check_file()
            if self._witness is not None and self._lines - self._handed >= MOST_UNWITNESSED:
                self._hand_over()
                if self._lines - self._handed >= MOST_UNWITNESSED:
                    raise OSError(errno.EIO, "nobody keeps the heads of the log")
            entry = {"time": round(time.time(), 3), "decision": kept, "previous": self._last}
            if digest is not None:
                entry["content"] = digest
            sealed = line_hash(entry)
            self._write(json.dumps({**entry, "hash": sealed}, sort_keys=True).encode() + b"\n")
            self._last, self._lines = sealed, self._lines + 1
            if self._lines - self._tried >= HEAD_LINES:
                self._hand_over()
        return sealed

    def hand_over(self) -> None:
        """Hands the newest head to the witness, if it has not got it yet."""
        with self._lock:
            self._hand_over()

    def close(self) -> None:
        with self._lock:
            self._hand_over()
            os.close(self._file)

    def _check_file(self) -> None:
        mine, named = os.fstat(self._file), self.path.stat()
        if (mine.st_ino, mine.st_dev) != (named.st_ino, named.st_dev) or mine.st_size != self._size:
            raise OSError(errno.EIO, "somebody else replaced, cut or wrote the file")

    def _write(self, data: bytes) -> None:
        try:
            left = data
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            # What came so far goes again: the next line must not be written behind half of one.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _hand_over(self) -> None:
        if self._witness is None or self._handed == self._lines:
            return
        self._tried = self._lines
        try:
            self._witness(Head(self.path.name, self._lines, self._last, round(time.time(), 3)))
        except Exception:  # tried again later; `append` counts
            return
        self._handed = self._lines


def verify(path: pathlib.Path, heads: Iterable[Head] = ()) -> int:
    """Checks the whole chain and returns the number of lines.

    Args:
        heads: of this log, as a witness kept them (`heads.trusted`).

    Raises:
        AuditError: a line is damaged, changed, missing or out of order; names the first such line.
    """
    witnessed = {head.lines: head for head in heads if head.log == path.name}
    previous = GENESIS
    number = 0
    with path.open(encoding="utf-8") as log:
        for number, line in enumerate(log, start=1):
            try:
                entry = json.loads(line)
                claimed = entry.pop("hash")
            except (ValueError, KeyError, AttributeError):
                raise AuditError(f"{path}, line {number}: not a line of an audit log.") from None
            if entry.get("previous") != previous or line_hash(entry) != claimed:
                raise AuditError(
                    f"{path}, line {number}: the chain is broken; this line or the one before it "
                    "was changed, removed or moved."
                )
            if number in witnessed and witnessed[number].hash != claimed:
                raise AuditError(
                    f"{path}, line {number}: is another line than the one whose hash was signed; "
                    "the log was written anew, from this line or an earlier one on."
                )
            previous = claimed
    longest = max(witnessed, default=0)
    if number < longest:
        raise AuditError(
            f"{path}: has {number} lines, but its head was signed when it had {longest}; lines "
            f"{number + 1} to {longest} were cut off."
        )
    return number


def verify_all(
    folders: Sequence[pathlib.Path], heads: Iterable[Head], since: float = 0.0
) -> dict[pathlib.Path, int]:
    """`verify` of every log of a service; path -> number of lines.

    Args:
        folders: all that hold logs of it; each namespace with models may have one.
        since: seconds since the epoch; logs whose last head is older may have been removed.

    Raises:
        AuditError: see `verify`; or a log is missing.
    """
    known = list(heads)
    paths = [path for folder in folders for path in sorted(folder.glob("audit-*.jsonl"))]
    there = {path.name for path in paths}
    wanted = {head.log for head in known if head.log.startswith("audit-") and head.time >= since}
    gone = sorted(wanted - there)
    if gone:
        raise AuditError(
            f"The log {gone[0]}, whose head was signed, and {len(gone) - 1} others are missing in "
            f"{', '.join(map(str, folders))}. Name every folder with logs of the service, and with "
            "--since what was removed on purpose."
        )
    return {path: verify(path, known) for path in paths}


def line_hash(entry: ReadOnlyJson) -> str:
    """The hash that seals an entry, which names the hash of the one before."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _end_of(path: pathlib.Path) -> tuple[str, int, int]:
    """The hash to go on from, the number of whole lines, and their size in bytes."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        return GENESIS, 0, 0
    try:
        return str(json.loads(lines[-1])["hash"]), len(lines), len(whole)
    except (ValueError, KeyError, TypeError):
        raise AuditError(f"{path}, line {len(lines)}: not a line of an audit log.") from None
