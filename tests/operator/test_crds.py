"""The custom resource definitions: current, structural, and with the defaults of the classes."""

from __future__ import annotations

import copy
import functools
import pathlib
import subprocess
import sys
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BaseModel, Field
from samples.valid_manifests import VALID

from calotype.operator.api import crdgen
from calotype.operator.api.moderation_policy import ModerationPolicy
from calotype.operator.api.schema import SchemaError, structural_schema
from calotype.serving.config import ImageModel, LoRAAdapter, LoRATraining, Team

CLASSES = {c.__name__: c for c in (ImageModel, LoRAAdapter, ModerationPolicy, Team, LoRATraining)}
MINIMAL: dict[str, dict[str, Any]] = {
    "ImageModel": {"source": {"builtIn": {"name": "shapes"}}},
    "LoRAAdapter": {"modelRef": {"name": "a"}, "source": {"huggingFace": {"repo": "a/b"}}},
    "ModerationPolicy": {"version": 1, "categories": {"sexual": {}}},
    "Team": {},
    "LoRATraining": {
        "modelRef": {"name": "a"},
        "dataset": {"persistentVolumeClaim": {"claimName": "pictures"}},
    },
}


@functools.cache
def definitions() -> dict[str, dict[str, Any]]:
    found = [yaml.safe_load(file.read_text()) for file in crdgen.FOLDER.glob("*.yaml")]
    return {crd["spec"]["names"]["kind"]: crd for crd in found}


def version(kind: str) -> Any:
    (only,) = definitions()[kind]["spec"]["versions"]
    return only


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """What the API server makes of a value: defaults first, then those inside them."""
    value = copy.deepcopy(value)
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if name not in value and "default" in field:
                value[name] = copy.deepcopy(field["default"])
            if name in value:
                value[name] = defaulted(field, value[name])
        if "additionalProperties" in schema:
            inner = schema["additionalProperties"]
            value = {key: defaulted(inner, item) for key, item in value.items()}
    if isinstance(value, list):
        value = [defaulted(schema["items"], item) for item in value]
    return value


def test_the_checked_in_files_are_what_the_classes_say() -> None:
    assert crdgen.stale(crdgen.FOLDER) == []


def test_stale_missing_and_foreign_files_are_told_apart(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crdgen.main(["--output", str(tmp_path)]) == 0
    assert crdgen.main(["--check", "--output", str(tmp_path)]) == 0
    (tmp_path / "teams.yaml").unlink()
    (tmp_path / "imagemodels.yaml").write_text("spec: {}")
    (tmp_path / "other.yaml").write_text("spec: {}")
    assert crdgen.main(["--check", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    for sentence in ("teams.yaml is missing", "imagemodels.yaml is out of date", "other.yaml"):
        assert sentence in said
    assert "run `python -m calotype.operator.api.crdgen`" in said


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("given", [MINIMAL, {k: m["spec"] for k, m in VALID.items()}])
def test_the_api_server_fills_in_what_the_classes_fill_in(
    kind: str, given: dict[str, dict[str, Any]]
) -> None:
    schema = version(kind)["schema"]["openAPIV3Schema"]["properties"]["spec"]
    # Kubernetes takes an explicit null for a field that is not there.
    spec = without_nulls(given[kind])
    resource = CLASSES[kind].model_validate({"metadata": {"name": "a"}, "spec": spec})
    dumped = resource.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    assert defaulted(schema, spec) == dumped


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def test_a_kind_without_a_required_field_needs_no_spec() -> None:
    schema = version("Team")["schema"]["openAPIV3Schema"]
    assert "required" not in schema
    assert defaulted(schema, {})["spec"]["weight"] == 1


def test_names_columns_and_subresources() -> None:
    short = {kind: crd["spec"]["names"].get("shortNames") for kind, crd in definitions().items()}
    assert short == {
        "ImageModel": ["im"],
        "LoRAAdapter": ["lora"],
        "ModerationPolicy": ["modpol"],
        "Team": [],
        "LoRATraining": ["loratrain"],
    }
    for kind, crd in definitions().items():
        assert crd["spec"]["names"]["categories"] == ["calotype"]
        assert crd["spec"]["scope"] == "Namespaced"
        assert version(kind)["subresources"]["status"] == {}
        assert "default" not in yaml.safe_dump(
            version(kind)["schema"]["openAPIV3Schema"]["properties"]["status"]
        ).replace("Default", ""), "what the operator did not say is not known"
    columns = version("LoRAAdapter")["additionalPrinterColumns"]
    assert [c["name"] for c in columns if not c.get("priority")] == [
        "Model",
        "Phase",
        "Loaded",
        "Revision",
        "Age",
    ]
    assert [c["name"] for c in columns if c.get("priority")] == ["Reason"]
    assert version("ImageModel")["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas.min",
        "statusReplicasPath": ".status.replicas.ready",
        "labelSelectorPath": ".status.selector",
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_every_column_shows_a_field_that_exists(kind: str) -> None:
    schema = version(kind)["schema"]["openAPIV3Schema"]
    for column in version(kind)["additionalPrinterColumns"]:
        path = column["jsonPath"].removeprefix(".").split("[")[0].split(".")
        if path[0] == "metadata":
            continue
        field = schema
        for part in path:
            field = field["properties"][part]
        if "[" not in column["jsonPath"]:
            assert field["type"] == column["type"]


class Bare(BaseModel):
    name: Annotated[str, Field(max_length=3)]


class Unbounded(BaseModel):
    name: str = Field(description="Text of any length.")


class LongList(BaseModel):
    names: list[int] = Field(description="As many as you like.")


class LargeMap(BaseModel):
    numbers: dict[str, int] = Field(description="As many as you like.")


class Either(BaseModel):
    value: int | bool = Field(description="One or the other.")


class Meaningful(BaseModel):
    value: int | None = Field(3, description="Null would not be the default.")


class Anything(BaseModel):
    value: dict[str, Any] = Field(description="Whatever.")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Bare, "Bare.name has no description"),
        (Unbounded, "Unbounded.name has no maxLength"),
        (LongList, "LongList.names has no maxItems"),
        (LargeMap, "LargeMap.numbers has no maxProperties"),
        (Either, "Either.value: 2 alternatives"),
        (Meaningful, "Meaningful.value: null would mean something else"),
        (Anything, "Anything.value: an object that could hold anything"),
    ],
)
def test_what_kubernetes_cannot_say_or_bound_is_refused(model: type[BaseModel], says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        structural_schema(model)


def test_the_generator_loads_nothing_heavy() -> None:
    probe = (
        "import sys, calotype.operator.api.crdgen; "
        "print(sorted({'torch', 'ray', 'fastapi', 'kopf', 'onnxruntime'} & sys.modules.keys()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
