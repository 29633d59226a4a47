"""Recognises stored pictures: fills the index of images, finds copies of what was taken down."""

from __future__ import annotations

import os
import time

import numpy as np

from calotype.moderation.errors import ImageError
from calotype.moderation.images import pdq
from calotype.moderation.images.decode import iter_views
from calotype.moderation.images.known_images import KnownList
from calotype.moderation.images.pdq import Pixels
from calotype.moderation.provenance import watermark
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.serving.api.review.removal import carry_out
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.config.environment import DATA_DIR
from calotype.serving.core.errors import NotFound
from calotype.serving.database.review.image_index import Fingerprint
from calotype.serving.database.review.takedowns import TakenDown
from calotype.serving.images.provenance import installation_keys
from calotype.serving.jobs.records import AssetRecord

INDEX_SECONDS = 20.0
"""One call reads stored pictures for so long; another call goes on."""
_PAGE = 20
_COUNTED = 100


def fingerprint(
    data: bytes, keys: InstallationKeys | None, *, as_made: bool = False
) -> Fingerprint:
    """What a picture file is recognised by.

    Args:
        as_made: a stored file, whose watermark is where it was put.

    Raises:
        ImageError: it is no picture that can be read.
    """
    views = iter_views(data)
    pixels: Pixels = next(views)
    for _ in views:
        pass  # a file that is damaged further on, or has too many frames, is none that we know
    payload = None
    for secret in (keys.watermark, *keys.former) if keys is not None else ():
        mark = watermark.detect(pixels, secret, as_made=as_made)
        if mark is not None:
            payload = mark.payload
            break
    turned, quality = pdq.pdq_turned(pixels)
    if quality < pdq.USABLE_QUALITY:
        return Fingerprint(None, payload)
    return Fingerprint(pdq.pdq(pixels).hexadecimal, payload, turned)


def index_stored(gateway: Gateway, keys: InstallationKeys | None) -> int:
    """Notes what stored pictures are recognised by; how many are left when the time is over.

    A picture that was checked before a takedown and stored after it is taken down here.
    """
    end, database = time.monotonic() + INDEX_SECONDS, gateway.database
    refused = TakenDown(database.takedowns)() if database.takedowns.unsettled() else None
    while pending := database.image_index.unindexed_assets(_PAGE):
        for asset in pending:
            found = _stored(gateway, asset, keys)
            label = None if refused is None else takedown_of(found, refused)
            if label is None:
                database.image_index.index_image(asset.id, found)
            else:
                carry_out(gateway, database.takedowns.extend(label, [asset.id]))
            if time.monotonic() > end:
                return len(database.image_index.unindexed_assets(_COUNTED))
    return 0


def takedown_of(found: Fingerprint, refused: KnownList) -> str | None:
    """The takedown that an image falls under."""
    if found.payload in refused.exact:
        return refused.exact[str(found.payload)][1]
    if found.turned is None or not len(refused.hashes):
        return None
    away = np.min([pdq.distances(refused.hashes, one) for one in found.turned], axis=0)
    nearest = int(away.argmin())
    return refused.labels[nearest] if away[nearest] <= pdq.SAME else None


def marking_keys(gateway: Gateway) -> InstallationKeys | None:
    """What the watermarks of this installation are read with."""
    folder = gateway.settings.data_dir
    own = {} if folder is None else {DATA_DIR: str(folder)}
    return installation_keys(dict(os.environ) | own, make=False)


def _stored(gateway: Gateway, asset: AssetRecord, keys: InstallationKeys | None) -> Fingerprint:
    try:
        return fingerprint(gateway.blobs.get(asset.blob_key), keys, as_made=True)
    except (NotFound, ImageError):
        return Fingerprint(None, None)  # its file is gone: there is nothing to find
