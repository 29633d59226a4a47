"""Manifests: what they may say, and what is said when they say something else."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import yaml

from calotype.serving.config import (
    BUILT_IN_ADAPTER,
    BUILT_IN_MODEL,
    ImageModelSpec,
    ManifestError,
    load_manifests,
)
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import ImageSize

MODEL: dict[str, Any] = {
    "apiVersion": "calotype.dev/v1alpha1",
    "kind": "ImageModel",
    "metadata": {"name": "flux-2-dev", "labels": {"a": "b"}},
    "spec": {"source": {"path": "weights"}, "aliases": ["dall-e-3"]},
}
ADAPTER: dict[str, Any] = {
    "apiVersion": "calotype.dev/v1alpha1",
    "kind": "LoRAAdapter",
    "metadata": {"name": "stripes"},
    "spec": {
        "modelRef": {"name": "flux-2-dev"},
        "source": {"path": "stripes.safetensors"},
        "scale": {"default": 0.8, "max": 2.0},
    },
}


def write(folder: pathlib.Path, *documents: Any, name: str = "all.yaml") -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return folder / name


def with_spec(document: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return document | {"spec": document["spec"] | spec}


def test_a_file_and_a_folder_say_the_same(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, MODEL, None, ADAPTER)
    for found in (load_manifests([file]), load_manifests([tmp_path])):
        assert [model.name for model in found.models] == ["flux-2-dev"]
        assert found.adapters[0].spec.scale.default == 0.8
        assert found.adapters[0].spec.scale.min == 0.0


def test_paths_are_relative_to_the_manifest(tmp_path: pathlib.Path) -> None:
    found = load_manifests([write(tmp_path / "deep", MODEL)])
    assert found.models[0].spec.source.path == str(tmp_path / "deep" / "weights")


def test_policies_are_kept_for_the_safety_stage(tmp_path: pathlib.Path) -> None:
    policy = {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ModerationPolicy",
        "metadata": {"name": "strict"},
        "spec": {"version": 1},
    }
    assert load_manifests([write(tmp_path, policy)]).policies == {"strict": {"version": 1}}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (["a"], "a resource is a mapping"),
        (MODEL | {"apiVersion": "v1"}, "apiVersion must be 'calotype.dev/v1alpha1'"),
        (MODEL | {"kind": "Pod"}, "kind must be ImageModel"),
        (MODEL | {"spec": {}}, "spec.source: field required|source: Field required"),
        (with_spec(MODEL, sorce={}), "sorce is not a field"),
        (with_spec(MODEL, source={}), "got none"),
        (
            with_spec(MODEL, source={"path": "a", "builtIn": {"name": "shapes"}}),
            "got builtIn and path",
        ),
        (with_spec(MODEL, replicas={"min": 3, "max": 1}), r"must not exceed"),
        (with_spec(MODEL, defaults={"size": "big"}), "WIDTHxHEIGHT"),
        (with_spec(MODEL, precision="float64"), "precision"),
        (MODEL | {"metadata": {"name": "Not A Name"}}, "metadata.name"),
        (with_spec(ADAPTER, sha256="abc"), "sha256"),
    ],
)
def test_a_wrong_manifest_is_named_with_file_and_field(
    tmp_path: pathlib.Path, document: Any, says: str
) -> None:
    file = write(tmp_path, document)
    with pytest.raises(ManifestError, match=says) as caught:
        load_manifests([file])
    assert str(file) in caught.value.message


def test_an_adapter_of_no_model_is_named(tmp_path: pathlib.Path) -> None:
    lost = with_spec(ADAPTER, modelRef={"name": "other"})
    with pytest.raises(ManifestError, match=r"'other'.*flux-2-dev"):
        load_manifests([write(tmp_path, MODEL, lost)])


def test_files_that_are_missing_or_no_yaml_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        load_manifests([tmp_path / "none.yaml"])
    (tmp_path / "bad.yaml").write_bytes(b"a: [1,")
    with pytest.raises(ManifestError, match="not valid YAML"):
        load_manifests([tmp_path])
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not valid YAML"):
        load_manifests([tmp_path])


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ("128x128", "128x128"),
        ("224x128", "224x128"),
        ("256x256", "128x128"),
        ("512x512", "128x128"),
        ("512x64", "512x64"),
        ("64x96", "64x96"),
        ("1024x1024", "128x128"),
        ("1024x1792", "128x224"),
        ("1792x1024", "224x128"),
    ],
)
def test_the_built_in_model_enlarges_what_it_cannot_draw(asked: str, drawn: str) -> None:
    assert str(BUILT_IN_MODEL.spec.check_size(ImageSize.parse(asked))) == drawn


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("48x128", "at least 64"),
        ("4096x4096", "4,194,304"),
        ("64x2048", "16 times"),
        ("100x128", "nearest is 96x128"),
    ],
)
def test_a_size_that_cannot_be_drawn_says_what_can(size: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        BUILT_IN_MODEL.spec.check_size(ImageSize.parse(size))
    assert caught.value.param == "size"


def test_without_enlarging_every_allowed_size_is_drawn_as_it_is() -> None:
    spec = ImageModelSpec.model_validate({"source": {"path": "x"}})
    assert str(spec.check_size(ImageSize(1024, 1536))) == "1024x1536"


@pytest.mark.parametrize(
    "text", ["", "abc", "10", "10x", "x10", "1x2x3", "-1x5", "1.5x2", "9" * 30]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="WIDTHxHEIGHT"):
        ImageSize.parse(text)


def test_the_example_adapter_belongs_to_the_built_in_model() -> None:
    assert BUILT_IN_ADAPTER.spec.model_ref.name == BUILT_IN_MODEL.name
