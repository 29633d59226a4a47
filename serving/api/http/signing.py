"""Signed addresses of pictures: each names one asset and a time at which it stops working."""

from __future__ import annotations

import hashlib
import hmac

from calotype.serving.api.state.gateway import Gateway


def signature(secret: bytes, asset_id: str, expires: int) -> str:
    return hmac.new(secret, f"{asset_id}\n{expires}".encode(), hashlib.sha256).hexdigest()


def signature_fits(secret: bytes, asset_id: str, expires: int, given: str) -> bool:
    expected = signature(secret, asset_id, expires)
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))


def content_url(gateway: Gateway, base: str, asset_id: str) -> str:
    """An address that whoever knows it may open for ``settings.url_seconds``.

    Args:
        base: `Gateway.base_url`.
    """
    expires = int(gateway.database.clock.time()) + gateway.settings.url_seconds
    signed = signature(gateway.url_secret, asset_id, expires)
    return f"{base}/v1/assets/{asset_id}/content?expires={expires}&signature={signed}"
