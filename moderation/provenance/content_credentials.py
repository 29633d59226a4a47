"""Content Credentials: a C2PA manifest in a png, jpeg or webp file that says how it was made.

c2pa-python writes and reads it, without network, thumbnail or time stamp. What it draws at random
(the salts of the assertions) is replaced by what follows from the image, and the claim is signed
anew: the same image signed by the same signer is the same file.

The manifest binds every byte of the file. Whatever is written into it afterwards breaks it, so a
recipe must be in the file before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype.moderation.errors import ProvenanceError

if TYPE_CHECKING:
    from calotype.moderation.provenance.signer import Signer

WATERMARK_ALGORITHM = "dev.calotype.watermark.1"
MIME_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_STORE = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71\x03c2pa\x00"
"""Where the description of the outermost box begins (C2PA 2.2, 11.1.4.2)."""
_SALT = b"c2sh"
_OFFLINE = {
    "builder": {"thumbnail": {"enabled": False}},
    "core": {"allowed_network_hosts": []},
    "verify": {
        "verify_after_sign": False,
        "remote_manifest_fetch": False,
        "ocsp_fetch": False,
    },
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the manifest of a file says, and whether it can be believed."""

    valid: bool
    """Nothing was changed since it was signed."""
    trusted: bool
    """Signed by this installation."""
    signer: str | None
    issuer: str | None
    algorithm: str | None
    generator: str | None
    source_type: str | None
    watermark: str | None
    """The payload of the invisible mark that was in the pixels when it was signed."""
    problems: tuple[str, ...]
    """C2PA's codes of what is wrong."""


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("c2pa") is not None


def sign(
    data: bytes,
    kind: str,
    signer: Signer,
    *,
    source_type: str,
    generator: tuple[str, str],
    watermark: str | None = None,
) -> bytes:
    """The file with a manifest in it.

    Args:
        data: the file, with everything else already in it.
        kind: ``png``, ``jpeg`` or ``webp``.
        source_type: IPTC's digital source type, as an address.
        generator: name and version of what made the image.
        watermark: payload of the invisible mark, in hexadecimal.

    Raises:
        ProvenanceError: the library is missing, or refuses the signer.
    """
    c2pa = _library()
    digest = hashlib.sha256(data).digest()
    signed: list[tuple[bytes, bytes]] = []

    def callback(claim: bytes) -> bytes:
        signature = signer.sign(bytes(claim))
        signed.append((bytes(claim), signature))
        return signature

    algorithm = c2pa.C2paSigningAlg[signer.algorithm.upper()]
    target = io.BytesIO()
    try:
        with c2pa.Signer.from_callback(callback, algorithm, signer.chain) as pen:
            manifest = _manifest(digest, kind, source_type, generator, watermark)
            with c2pa.Builder.from_json(json.dumps(manifest), _context(None)) as builder:
                builder.sign(pen, MIME_TYPES[kind], io.BytesIO(data), target)
    except c2pa.C2paError as error:
        raise ProvenanceError(f"The picture could not be signed: {error}.") from error
    if not signer.repeats:
        return target.getvalue()
    return _repeatable(target.getvalue(), kind, digest, *signed[-1], signer)


def read(data: bytes, kind: str, anchors: str = "") -> Credentials | None:
    """What the manifest in a file says; None if there is none.

    Args:
        anchors: certificates in PEM that are trusted.

    Raises:
        ProvenanceError: the library is missing.
    """
    c2pa = _library()
    try:
        with c2pa.Reader(MIME_TYPES[kind], io.BytesIO(data), context=_context(anchors)) as reader:
            report = json.loads(reader.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in f"{type(error).__name__} {error}":
            return None
        return Credentials(False, False, None, None, None, None, None, None, (str(error),))
    active = report["manifests"][report["active_manifest"]]
    assertions = {part["label"]: part["data"] for part in active.get("assertions", [])}
    actions = assertions.get("c2pa.actions.v2", assertions.get("c2pa.actions", {})).get(
        "actions", []
    )
    sources = [action["digitalSourceType"] for action in actions if "digitalSourceType" in action]
    binding = assertions.get("c2pa.soft-binding", {})
    blocks = binding.get("blocks", []) if binding.get("alg") == WATERMARK_ALGORITHM else []
    by = active.get("signature_info") or {}
    made = (active.get("claim_generator_info") or [{}])[0]
    state = report.get("validation_state", "Invalid")
    codes = [str(item["code"]) for item in report.get("validation_status", [])]
    return Credentials(
        valid=state in ("Valid", "Trusted"),
        trusted=state == "Trusted",
        signer=by.get("common_name"),
        issuer=by.get("issuer"),
        algorithm=by.get("alg"),
        generator=" ".join(str(made[key]) for key in ("name", "version") if key in made) or None,
        source_type=sources[0] if sources else None,
        watermark=str(blocks[0]["value"]) if blocks else None,
        problems=tuple(sorted(set(codes))),
    )


def _manifest(
    digest: bytes, kind: str, source_type: str, generator: tuple[str, str], watermark: str | None
) -> dict[str, Any]:
    # It follows from the file; the library takes identities of version 4 only.
    identity = uuid.UUID(bytes=digest[:16], version=4)
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": source_type}]}
    assertions: list[dict[str, Any]] = [{"label": "c2pa.actions.v2", "data": actions}]
    if watermark is not None:
        binding = {"alg": WATERMARK_ALGORITHM, "blocks": [{"scope": {}, "value": watermark}]}
        assertions.append({"label": "c2pa.soft-binding", "data": binding})
    return {
        "claim_generator_info": [{"name": generator[0], "version": generator[1]}],
        "format": MIME_TYPES[kind],
        "instance_id": f"xmp:iid:{identity}",
        "label": f"urn:c2pa:{identity}",
        "assertions": assertions,
    }


def _repeatable(
    data: bytes, kind: str, digest: bytes, claimed: bytes, signature: bytes, signer: Signer
) -> bytes:
    """The signed file with salts that follow from the image instead of random ones.

    Args:
        claimed: the bytes that were signed; the claim stands in them as it does in the file.
    """
    file, begin = bytearray(data), data.find(_STORE) - 12
    if begin < 0:
        raise ProvenanceError("The signed picture has no manifest store in one piece.")
    fresh = claimed
    for start, end in _salted(data, begin):
        before = hashlib.sha256(data[start:end]).digest()
        salt = data.index(_SALT, start, end) + len(_SALT)
        file[salt : salt + 16] = bytes(16)
        file[salt : salt + 16] = hashlib.sha256(digest + file[start:end]).digest()[:16]
        fresh = _swapped(fresh, before, hashlib.sha256(file[start:end]).digest())
    for old, new in _differences(claimed, fresh):
        file[:] = _swapped(bytes(file), old, new)
    file[:] = _swapped(bytes(file), signature, signer.sign(fresh))
    if kind == "png":
        chunk = data.index(b"caBX")
        length = int.from_bytes(file[chunk - 4 : chunk], "big")
        crc = zlib.crc32(file[chunk : chunk + 4 + length])
        file[chunk + 4 + length : chunk + 8 + length] = crc.to_bytes(4, "big")
    return bytes(file)


def _differences(before: bytes, after: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The hashes of 32 bytes that differ between two texts of one length."""
    at = 0
    while at < len(before):
        if before[at] != after[at]:
            yield before[at : at + 32], after[at : at + 32]
            at += 32
        else:
            at += 1


def _swapped(text: bytes, old: bytes, new: bytes) -> bytes:
    if text.count(old) != 1:
        raise ProvenanceError("The manifest of the signed picture is not built as expected.")
    return text.replace(old, new)


def _salted(data: bytes, begin: int) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes with a salt begin and end."""
    waiting = [(begin, begin + int.from_bytes(data[begin : begin + 4], "big"))]
    while waiting:
        at, end = waiting.pop()
        while at + 8 <= end:
            length = int.from_bytes(data[at : at + 4], "big")
            if length < 8:
                return
            if data[at + 4 : at + 8] == b"jumb":
                description = at + 8 + int.from_bytes(data[at + 8 : at + 12], "big")
                if _SALT in data[at + 8 : description]:
                    yield at + 8, at + length
                else:
                    waiting.append((description, at + length))
            at += length


@functools.lru_cache(maxsize=8)
def _context(anchors: str | None) -> Any:
    """Settings for writing (None), or for reading with these trusted certificates."""
    settings: dict[str, Any] = dict(_OFFLINE)
    if anchors:
        settings["trust"] = {"user_anchors": anchors}
    return _library().Context.from_dict(settings)


def _library() -> Any:
    try:
        import c2pa
    except ImportError:
        raise ProvenanceError(
            "Content Credentials need the library c2pa: install calotype[provenance]."
        ) from None
    return c2pa
