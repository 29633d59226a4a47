"""Control maps of a lease: made of the pictures that were given, and kept for the answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calotype.serving.core.protocols import BlobStore
from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.control.preprocessors import UsedMap, use_maps
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import MapResult
from calotype.serving.storage import new_key


@dataclass(frozen=True, slots=True)
class DrawnAfter:
    """What the engine is given.

    Attributes:
        request: names maps where it named pictures to make them of.
        files: the given ones, and the maps.
    """

    request: GenerationRequest
    files: Mapping[str, bytes]
    maps: Sequence[UsedMap] = field(default_factory=list)

    @classmethod
    async def of(cls, request: GenerationRequest, files: Mapping[str, bytes]) -> DrawnAfter:
        """Makes the maps.

        Raises:
            InvalidRequest, EngineError: see `use_maps`.
        """
        if not request.controls:
            return cls(request, files)
        return cls(*await asyncio.to_thread(use_maps, request, files))

    @property
    def fitted(self) -> list[str] | None:
        """What `JobMetrics` says of maps that were given in another size."""
        size = self.request.rendered_size
        found = [
            f"controlnets[{place}]: {one.fitted} to {size}"
            for place, one in enumerate(self.maps)
            if one.fitted is not None
        ]
        return found or None

    async def stored(self, lease: Lease, blobs: BlobStore) -> list[MapResult]:
        """Stores the maps beside the images.

        Raises:
            StorageFailed: a file could not be written.
        """
        size = self.request.rendered_size
        results = []
        for place, one in enumerate(self.maps):
            key = new_key(lease.team_id, one.data, "png")
            await asyncio.to_thread(blobs.put, key, one.data)
            results.append(
                MapResult(
                    asset_id=new_id("asset"),
                    blob_key=key,
                    index=place,
                    width=size.width,
                    height=size.height,
                    sha256=hashlib.sha256(one.data).hexdigest(),
                    fitted=None if one.fitted is None else str(one.fitted),
                )
            )
        return results
