"""The one name for JSON objects whose fields are read elsewhere.

Examples: a body as a client sent it, a recipe, a column of the job database as it is stored.
"""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
