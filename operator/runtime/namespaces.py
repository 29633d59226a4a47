"""Keeps the store's view of namespaces fresh: their labels, and which of them are being deleted."""

from __future__ import annotations

import logging

from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.resources import NAMESPACES
from calotype.operator.runtime.store import Store

log = logging.getLogger(__name__)


async def refresh_namespace(kube: KubeClient, store: Store, name: str) -> None:
    """Reads one namespace; one that may not be read has no labels."""
    try:
        found = await kube.get(NAMESPACES, "", name)
    except ApiError as error:
        if error.status != 403:
            raise
        log.debug("namespace %s may not be read: %s", name, error)
        return
    if found is None:
        store.set_namespace(name, {}, True)
        return
    metadata = found["metadata"]
    ending = (found.get("status") or {}).get("phase") == "Terminating"
    ending = ending or "deletionTimestamp" in metadata
    store.set_namespace(name, metadata.get("labels") or {}, ending)
