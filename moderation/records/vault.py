"""Encrypted copies of prompts, readable until their key is deleted.

A decision's prompt is kept sealed (AES-GCM) in a file of its day, beside the audit log, which only
holds a keyed digest of it. Every day has a key of its own; when its time is over key and file are
deleted, so copies of the file elsewhere, in backups too, can never be read again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable

from calotype.moderation.errors import AuditError

DAY = 86400.0
_KEY_BYTES = 32


class PromptVault:
    """The prompts of one folder, written by one process at a time per file name. Thread-safe.

    Args:
        folder: beside the audit log; made with access for its owner alone.
        writer: names this process's files.
        clock: seconds since the epoch.
    """

    def __init__(
        self, folder: pathlib.Path, writer: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self._writer, self._clock = folder, writer, clock
        self._lock = threading.Lock()
        self._purged = 0.0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._digest_key = _key(folder / "digest.key")

    def digest(self, text: str) -> str:
        """Keyed digest of a prompt: the same prompt is found again, nobody can guess it."""
        data = text.encode("utf-8", "surrogatepass")
        return hmac.new(self._digest_key, data, hashlib.sha256).hexdigest()

    def keep(self, decision_id: str, text: str, days: int) -> None:
        """Seals the text of a decision for ``days``. Raises OSError."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        now = self._clock()
        with self._lock:
            if now - self._purged > 3600:
                self._purge(now, days)
                self._purged = now
            day = int(now // DAY)
            key = _key(self.folder / f"day-{day}.key")
            nonce = secrets.token_bytes(12)
            data = text.encode("utf-8", "surrogatepass")
            sealed = nonce + AESGCM(key).encrypt(nonce, data, decision_id.encode())
            line = {"id": decision_id, "sealed": base64.b64encode(sealed).decode()}
            with (self.folder / f"day-{day}-{self._writer}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def read(self, decision_id: str) -> str:
        """The prompt of a decision.

        Raises:
            AuditError: it was not kept, or its time is over.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        for path in sorted(self.folder.glob("day-*-*.jsonl"), reverse=True):
            for line in path.read_text().splitlines():
                if f'"{decision_id}"' not in line:
                    continue
                key_path = self.folder / f"day-{path.name.split('-')[1]}.key"
                if not key_path.exists():
                    break
                sealed = base64.b64decode(json.loads(line)["sealed"])
                try:
                    data = AESGCM(key_path.read_bytes()).decrypt(
                        sealed[:12], sealed[12:], decision_id.encode()
                    )
                except InvalidTag:
                    raise AuditError(
                        f"{path}: the prompt of {decision_id} was changed since it was kept."
                    ) from None
                return data.decode("utf-8", "surrogatepass")
        raise AuditError(
            f"No prompt of decision {decision_id} is kept in {self.folder}: "
            "the policy kept none, or its time is over."
        )

    def purge(self, days: int) -> None:
        """Deletes keys and prompts older than ``days``."""
        with self._lock:
            self._purge(self._clock(), days)

    def _purge(self, now: float, days: int) -> None:
        oldest = int(now // DAY) - days
        for path in self.folder.glob("day-*"):
            number = path.name.removeprefix("day-").split("-")[0].split(".")[0]
            if number.isdigit() and int(number) < oldest:
                path.unlink(missing_ok=True)


def _key(path: pathlib.Path) -> bytes:
    """The key of a file, made at first use and readable by its owner alone."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(handle, "wb") as file:
        key = secrets.token_bytes(_KEY_BYTES)
        file.write(key)
    return key
