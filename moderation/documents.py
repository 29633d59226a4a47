"""JSON whose fields are given from outside: policy documents, audit lines, C2PA manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
ReadOnlyJson = Mapping[str, Any]
