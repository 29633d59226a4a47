"""Content Credentials: a C2PA manifest in a png, jpeg or webp file that says how it was made.

c2pa-python writes and reads it, without network, thumbnail or time stamp. It draws the manifest's
label and the salts of its assertions at random, so the same image signed twice has equal pixels and
different bytes.

The manifest binds every byte of the file. Whatever is written into it afterwards breaks it, so a
recipe must be in the file before.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from dataclasses import dataclass
from typing import Any

from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import ProvenanceError
from calotype.moderation.provenance.signer import Signer

WATERMARK_ALGORITHM = "dev.calotype.watermark.1"
MIME_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

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
    algorithm = c2pa.C2paSigningAlg[signer.algorithm.upper()]
    manifest = json.dumps(_manifest(kind, source_type, generator, watermark))
    target = io.BytesIO()
    try:
        with (
            c2pa.Signer.from_callback(
                lambda claim: signer.sign(bytes(claim)), algorithm, signer.chain
            ) as pen,
            c2pa.Builder.from_json(manifest, _context(None)) as builder,
        ):
            builder.sign(pen, MIME_TYPES[kind], io.BytesIO(data), target)
    except c2pa.C2paError as error:
        raise ProvenanceError(f"The picture could not be signed: {error}.") from error
    return target.getvalue()


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
    kind: str, source_type: str, generator: tuple[str, str], watermark: str | None
) -> JsonObject:
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": source_type}]}
    assertions: list[JsonObject] = [{"label": "c2pa.actions.v2", "data": actions}]
    if watermark is not None:
        binding = {"alg": WATERMARK_ALGORITHM, "blocks": [{"scope": {}, "value": watermark}]}
        assertions.append({"label": "c2pa.soft-binding", "data": binding})
    return {
        "claim_generator_info": [{"name": generator[0], "version": generator[1]}],
        "format": MIME_TYPES[kind],
        "assertions": assertions,
    }


@functools.lru_cache(maxsize=8)
def _context(anchors: str | None) -> Any:
    """Settings for writing (None), or for reading with these trusted certificates."""
    settings: JsonObject = dict(_OFFLINE)
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
