"""Secrets that follow from the internal token of a service, for whoever must not have it."""

from __future__ import annotations

import hashlib
import hmac


def derived_secret(internal_token: str, purpose: str) -> str:
    """A secret for one purpose, in hexadecimal; it says nothing of the token or of other ones."""
    return hmac.new(internal_token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def marks_secret(internal_token: str) -> str:
    """What the keys of an installation's marks follow from (`images.provenance`)."""
    return derived_secret(internal_token, "marks")
