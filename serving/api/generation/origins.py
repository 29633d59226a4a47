"""Notes what adapters learnt from, as their files say, before anything is drawn with them."""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from calotype.serving.api.generation.recipes import adapter_digest
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.engine.sizing.adapter_origins import read_origins


def note_origins(gateway: Gateway, model: str, adapters: Collection[str]) -> None:
    """Of adapters in files that the gateway can read; of others whoever trained them tells it.

    Args:
        adapters: names of those that a request uses.

    Raises:
        InvalidRequest: a file says what it learnt from, and cannot be understood.
        StorageFailed: it cannot be noted.
    """
    for adapter in gateway.catalog.adapters(model):
        place = adapter.spec.source.path
        if adapter.name not in adapters or place is None:
            continue
        digest = adapter_digest(adapter)
        if digest in gateway.noted_origins:
            continue
        found = read_origins(pathlib.Path(place))
        if found is not None:
            gateway.database.origins.record(
                digest, adapter.name, found.dataset_digest, found.pictures, found.command
            )
        gateway.noted_origins.add(digest)
