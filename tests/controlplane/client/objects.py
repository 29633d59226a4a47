"""What the API server sends and takes: one name for JSON whose fields Kubernetes defines."""

from typing import Any

Object = dict[str, Any]
