"""The audit log: one line per decision, hash-chained.

Append-only JSON lines. It holds what was decided and why, never a prompt or an image. Whoever
changes, removes or reorders a line breaks the chain from there on, which `verify` tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import threading
import time

from calotype.moderation.documents import ReadOnlyJson
from calotype.moderation.errors import AuditError

GENESIS = "0" * 64
KEPT = (
    *("id", "stage", "policy", "policy_sha256", "verdict", "categories", "scores", "peaks"),
    *("findings", "asked", "preset", "granted"),
)
"""What a line keeps of a decision; ``reason`` may hold paths and is left out."""


class AuditLog:
    """One writer's log. Thread-safe; every line is on the disk before `append` returns."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last = _last_hash(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, decision: ReadOnlyJson, digest: str | None = None) -> str:
        """Records a decision's payload and returns the line's hash. Raises OSError.

        Args:
            digest: keyed digest of what was checked (`vault.PromptVault.digest`).
        """
        kept = {name: decision[name] for name in KEPT if name in decision}
        with self._lock:
            entry = {"time": round(time.time(), 3), "decision": kept, "previous": self._last}
            if digest is not None:
                entry["content"] = digest
            sealed = line_hash(entry)
            self._file.write(json.dumps({**entry, "hash": sealed}, sort_keys=True) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._last = sealed
        return sealed

    def close(self) -> None:
        self._file.close()


def verify(path: pathlib.Path) -> int:
    """Checks the whole chain and returns the number of lines.

    Raises:
        AuditError: a line is damaged, changed, missing or out of order; names the first such line.
    """
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
            previous = claimed
    return number


def line_hash(entry: ReadOnlyJson) -> str:
    """The hash that seals an entry, which names the hash of the one before."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _last_hash(path: pathlib.Path) -> str:
    """The hash to go on from; a half-written last line (power loss) is cut off."""
    if not path.exists():
        return GENESIS
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        path.write_bytes(whole)
    lines = whole.splitlines()
    return str(json.loads(lines[-1])["hash"]) if lines else GENESIS
