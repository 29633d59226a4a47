"""What no file may say: the table of `wrong_manifests`, read as `calotype serve -f` reads it."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from samples.valid_manifests import VALID
from samples.wrong_manifests import WRONG, Wrong

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.policy import Policy
from calotype.serving.config import ManifestError, Manifests, read_manifests


def read(folder: pathlib.Path, document: object) -> Manifests:
    """As `calotype serve` does: the manifests, then the policies in them."""
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    found = read_manifests([file])
    for name, spec in found.policies.items():
        Policy.from_spec(name, spec)
    return found


@pytest.mark.parametrize("kind", VALID)
def test_the_manifests_that_are_changed_are_valid(kind: str, tmp_path: pathlib.Path) -> None:
    found = read(tmp_path, VALID[kind])
    assert sum(map(len, found.model_dump().values())) == 1


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_manifest_is_refused_with_what_to_write(
    wrong: Wrong, tmp_path: pathlib.Path
) -> None:
    with pytest.raises((ManifestError, PolicyError)) as caught:
        read(tmp_path, wrong.manifest)
    sentence = str(caught.value)
    assert wrong.says in sentence
    assert "\n" not in sentence


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len({(w.kind, w.field, str(w.value)) for w in WRONG}) == len(WRONG) >= 40
