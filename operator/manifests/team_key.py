"""A Team's API key: made once for every ``keys.rotate``, kept in a Secret, known elsewhere by hash.

The key has the format of `calotype keys create`. The Secret is created, never overwritten, so that
an operator that was killed half-way finds the key that it made.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets

from calotype.operator.kube.labels import ROTATION, labels, owner_reference
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.settings import OperatorSettings

KEY_PREFIX = "ct_live_"
SECRET_KEY = "api-key"


def secret_name(team: str) -> str:
    return f"calotype-key-{team}"


def make_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def build_secret(owner: Object, key: str, rotation: int, settings: OperatorSettings) -> Manifest:
    """The Secret with the key."""
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": secret_name(name),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels(settings, "gateway", team=name),
            "annotations": {ROTATION: str(rotation)},
            "ownerReferences": [owner_reference(owner)],
        },
        "type": "Opaque",
        "data": {SECRET_KEY: base64.b64encode(key.encode()).decode()},
    }


def key_of(secret: Object) -> str | None:
    """The key that a Secret holds; None where it holds none, or something that is no text."""
    try:
        found = base64.b64decode((secret.get("data") or {})[SECRET_KEY]).decode().strip()
    except (KeyError, ValueError, binascii.Error):
        return None
    return found or None


def key_hash(key: str) -> str:
    """What the gateway knows of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def rotation_of(secret: Object) -> int | None:
    """The ``keys.rotate`` that a Secret's key was made for; None for one that we did not make."""
    text = (secret["metadata"].get("annotations") or {}).get(ROTATION)
    return int(text) if text is not None and text.isdigit() else None
