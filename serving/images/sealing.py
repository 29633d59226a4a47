"""Files that nobody reads without their key: images that wait for a person.

Each file has a key of its own, which lies in the database; the file lies with the other images.
Who has only one of the two sees nothing, and when the key goes every copy of the file is lost.
"""

from __future__ import annotations

import secrets

from calotype.serving.core.errors import StorageFailed

_NONCE = 12


def make_seal() -> str:
    """A fresh key, in hexadecimal."""
    return secrets.token_hex(32)


def seal(data: bytes, key: str, name: str) -> bytes:
    """The file, readable with the key under this name only."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(bytes.fromhex(key)).encrypt(nonce, data, name.encode())


def unseal(data: bytes, key: str, name: str) -> bytes:
    """Raises StorageFailed: the file was changed, or is another one's."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(bytes.fromhex(key)).decrypt(data[:_NONCE], data[_NONCE:], name.encode())
    except (InvalidTag, ValueError):  # also where there is no key any more
        raise StorageFailed(f"The held picture {name} was changed since it was stored.") from None
