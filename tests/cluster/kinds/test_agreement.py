"""Files and the API server agree: whatever a field says, both take it or both refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from samples.valid_manifests import REMOVED, VALID, changed

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.serving.config import ManifestError, read_manifests

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STRANGE: list[Any] = [
    REMOVED,
    None,
    "",
    "x",
    "0",
    "true",
    " flux ",
    "a" * 5000,
    "Ünicode\n\t",
    "1024x1024",
    "8Gi",
    "../../etc",
    True,
    0,
    1,
    -1,
    17,
    10**12,
    0.5,
    1e300,
    [],
    ["a"],
    ["a", "a"],
    [None],
    [1] * 2000,
    {},
    {"name": "a"},
    {"a": {"b": 1}},
]
THIN = 4
"""Every field gets every so-many-th value, its neighbour the next ones."""


def fields(value: Any, path: str = "spec") -> Iterator[str]:
    """Every field under a value, the inner ones last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields(inner, f"{path}.{key}")


def of_a_file(document: Object, file: Path) -> str:
    """What a file is refused for; empty = it is read."""
    file.write_text(yaml.dump(document, Dumper=yaml.CSafeDumper), encoding="utf-8")
    try:
        for name, spec in read_manifests([file]).policies.items():
            Policy.from_spec(name, spec)
    except (ManifestError, PolicyError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", VALID)
def test_files_and_the_api_server_refuse_the_same(
    kinds: Cluster, tmp_path: Path, kind: str
) -> None:
    refused, differences = 0, []
    for number, field in enumerate(fields(VALID[kind]["spec"])):
        for value in STRANGE[number % THIN :: THIN]:
            document = changed(VALID[kind], field, value)
            here, answer = of_a_file(document, tmp_path / "a.yaml"), kinds.dry_create(document)
            assert answer.status in (201, 400, 422), answer
            there = answer.message
            refused += bool(there)
            if bool(here) != bool(there):
                shown = "removed" if value is REMOVED else repr(value)[:60]
                differences.append(f"{field} = {shown}\n  file: {here}\n  server: {there[:300]}")
    assert not differences, "\n".join(differences)
    assert refused > 50, "the values are strange enough"
