"""Kubernetes objects as JSON: documents whose schemas are Kubernetes', KubeRay's and our CRDs'.

Custom resources of ours are typed where they are read (`manifests.custom_resources.parse`); what is
written, and the objects of others, stay JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Manifest = dict[str, Any]
"""An object, or a part of one, that we build or change."""
Object = Mapping[str, Any]
"""An object, or a part of one, as the API server gave it."""

Address = tuple[str, str]
"""Namespace and name."""


def address_of(obj: Object) -> Address:
    """Of an object; the namespace is empty where its kind has none."""
    return obj["metadata"].get("namespace") or "", obj["metadata"]["name"]


def shown(address: Address) -> str:
    """As people write it."""
    return f"{address[0]}/{address[1]}"
