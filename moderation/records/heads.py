"""Signed heads of audit logs: how long a log was at a moment, and the hash of its last line.

Whoever writes a log cannot sign: the key is where the heads are kept. A head that was signed says
for ever what the log held, so a cut end or a new chain is noticed.
"""

from __future__ import annotations

import json
import os
import pathlib
import secrets
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from calotype.moderation.errors import AuditError

KEY_FILE = "audit-signing.key"
_SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a log at a moment."""

    log: str
    """Name of its file."""
    lines: int
    hash: str
    """Of its last line, in hexadecimal."""
    time: float
    """Seconds since the epoch."""

    def to_bytes(self) -> bytes:
        """What is signed."""
        return json.dumps(asdict(self), sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head with its Ed25519 signature."""

    head: Head
    signature: str
    """In hexadecimal."""
    key: str
    """The public key, in hexadecimal."""

    def to_bytes(self) -> bytes:
        """A JSON document."""
        document = {**asdict(self.head), "signature": self.signature, "key": self.key}
        return json.dumps(document, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SignedHead:
        """Raises AuditError: it is no such document."""
        try:
            found = json.loads(data)
            head = Head(
                str(found["log"]), int(found["lines"]), str(found["hash"]), float(found["time"])
            )
            return cls(head, str(found["signature"]), str(found["key"]))
        except (ValueError, KeyError, TypeError):
            raise AuditError(f"{data[:80]!r} is no signed head of an audit log.") from None


class HeadKey:
    """The key that signs heads.

    Args:
        seed: 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw().hex()
        """In hexadecimal: what `trusted` needs."""

    @classmethod
    def from_text(cls, text: str) -> HeadKey:
        """Raises AuditError: it is not 64 hexadecimal digits."""
        try:
            seed = bytes.fromhex(text.strip())
        except ValueError:
            seed = b""
        if len(seed) != _SEED_BYTES:
            raise AuditError("The key that signs audit logs must have 64 hexadecimal digits.")
        return cls(seed)

    @classmethod
    def in_folder(cls, folder: pathlib.Path, *, make: bool) -> HeadKey | None:
        """The key of a data folder; None where there is none and none is made."""
        path = folder / KEY_FILE
        if make:
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                pass
            else:
                with os.fdopen(handle, "w") as file:
                    file.write(secrets.token_hex(_SEED_BYTES))
        return cls.from_text(path.read_text()) if path.exists() else None

    def sign(self, head: Head) -> SignedHead:
        return SignedHead(head, self._private.sign(head.to_bytes()).hex(), self.public)


def trusted(heads: Iterable[SignedHead], keys: Collection[str]) -> list[Head]:
    """The heads, each of which one of these keys signed.

    Args:
        keys: public keys, in hexadecimal; after a rotation the former ones, too.

    Raises:
        AuditError: another key signed one of them, or it was changed since.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    found = []
    for signed in heads:
        head = signed.head
        if signed.key not in keys:
            raise AuditError(
                f"A head of {head.log} ({head.lines} lines) is signed by a key that you do "
                f"not trust, {signed.key[:16]}...; name it with --key if it is a former one."
            )
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key))
            public.verify(bytes.fromhex(signed.signature), head.to_bytes())
        except (InvalidSignature, ValueError):
            raise AuditError(
                f"A head of {head.log} ({head.lines} lines) was changed after it was signed."
            ) from None
        found.append(head)
    return found
