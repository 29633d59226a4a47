"""The keys of an installation: for its watermark and for its signatures.

They lie in a folder (``watermark.key``, ``signer.key`` with ``signer.pem``), made at the first use,
or follow from a secret that all processes of a cluster share. Whoever has the watermark's key can
forge and remove the mark; it is as secret as the signer's.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import secrets
from dataclasses import dataclass, field

from calotype.moderation.errors import ProvenanceError
from calotype.moderation.provenance.signer import Signer

WATERMARK_KEY, SIGNER_KEY, SIGNER_CHAIN = "watermark.key", "signer.key", "signer.pem"
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class InstallationKeys:
    """What marks are made and found with."""

    watermark: bytes = field(repr=False)
    former: tuple[bytes, ...] = field(default=(), repr=False)
    """Keys of the watermark that are only looked for."""
    own_signer: tuple[pathlib.Path, pathlib.Path] | None = None
    """Chain and key of the organisation's own."""

    @property
    def name(self) -> str:
        """What tells installations apart: it follows from the key and says nothing about it."""
        return hashlib.blake2b(b"name", key=self.watermark, digest_size=6).hexdigest()

    def signer(self) -> Signer:
        """Raises ProvenanceError: a library or a file is missing or wrong."""
        if self.own_signer is not None:
            return Signer.load(*self.own_signer)
        return Signer.derived(hashlib.blake2b(b"signer", key=self.watermark).digest())

    @classmethod
    def derived(cls, secret: bytes, folder: pathlib.Path | None = None) -> InstallationKeys:
        """Keys that follow from a secret; a signer of its own if the folder holds one."""
        key = hashlib.blake2b(
            b"watermark", key=hashlib.sha256(secret).digest(), digest_size=SECRET_BYTES
        ).digest()
        return cls(key, _former(folder, key), _own_signer(folder))

    @classmethod
    def in_folder(cls, folder: pathlib.Path, *, make: bool = True) -> InstallationKeys | None:
        """The keys in a folder; made there if it holds none, or None if they shall not be.

        Raises:
            ProvenanceError: the folder cannot be written, or a file in it is no key.
        """
        path = folder / WATERMARK_KEY
        try:
            if not path.exists():
                if not make:
                    return None
                folder.mkdir(parents=True, exist_ok=True)
                _make(path)
            key = _read(path)
        except OSError as error:
            raise ProvenanceError(
                f"{path}: cannot be made or read ({error.strerror}); name a folder that can be "
                "written with CALOTYPE_PROVENANCE_DIR."
            ) from None
        return cls(key, _former(folder, key), _own_signer(folder))


def _make(path: pathlib.Path) -> None:
    """Writes a fresh key; of several processes that do so at once one wins."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()


def _read(path: pathlib.Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError:
        key = b""
    if len(key) != SECRET_BYTES:
        raise ProvenanceError(
            f"{path}: must hold {SECRET_BYTES} bytes in hexadecimal, {2 * SECRET_BYTES} digits."
        )
    return key


def _former(folder: pathlib.Path | None, key: bytes) -> tuple[bytes, ...]:
    """``watermark-NAME.key`` of a folder: keys that were used before."""
    if folder is None:
        return ()
    found = (_read(path) for path in sorted(folder.glob("watermark-*.key")))
    return tuple(other for other in found if other != key)


def _own_signer(folder: pathlib.Path | None) -> tuple[pathlib.Path, pathlib.Path] | None:
    if folder is None:
        return None
    chain, key = folder / SIGNER_CHAIN, folder / SIGNER_KEY
    if chain.exists() != key.exists():
        there, missing = (chain, key) if chain.exists() else (key, chain)
        raise ProvenanceError(
            f"{missing}: is missing beside {there.name}; an own signer needs both."
        )
    return (chain, key) if chain.exists() else None
