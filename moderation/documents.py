"""JSON and YAML whose fields are given from outside: policies, audit lines, C2PA manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

JsonObject = dict[str, Any]
ReadOnlyJson = Mapping[str, Any]


def packaged_yaml(text: str) -> Any:
    """A YAML file of the package, by libyaml where it is there: ten times as fast.

    Documents of users go through PyYAML's own parser, whose messages name what is wrong better.
    """
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
