"""Tells whether a replica has the configuration that was last given to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_hash(config: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of the sha256 of a ``user_config`` as JSON.

    Keys are sorted, and whole numbers have no fraction: on the way through Kubernetes 4.0 becomes
    4, which changes nothing for whoever reads it.
    """
    text = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
