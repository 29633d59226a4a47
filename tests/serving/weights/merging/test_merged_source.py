"""`spec.source.merge`: a model that is merged when its weights are brought."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from calotype.operator.planning.weights import fetch_task, is_fetched
from calotype.serving.config import ImageModel, ModelSource, credential_keys
from calotype.serving.config.files import ManifestError, read_manifests
from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed
from calotype.serving.deployments.preparation import read_resources
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_tiny_flux2
from calotype.serving.weights.fetch import run_order
from calotype.serving.weights.merging.merged_source import with_merged_source
from calotype.serving.weights.sources import model_folder
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_order import FetchOrder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    first = save_tiny_flux2(root / "a", seed=1)
    shutil.copytree(first, root / "b")
    other = save_tiny_flux2(root / "other", seed=2)
    shutil.copy(other / WEIGHTS, root / "b" / WEIGHTS)
    return root


def merge_of(folders, **more):
    models = [
        {"source": {"path": str(folders / name)}, "licence": "apache-2.0", "weight": weight}
        for name, weight in (("a", 1.0), ("b", 3.0))
    ]
    return {"merge": {"method": "linear", "inputs": models} | more}


def model(source):
    document = {"kind": "ImageModel", "metadata": {"name": "mixed"}, "spec": {"source": source}}
    return ImageModel.model_validate(document)


def expected(folders):
    a, b = (load_file(str(folders / name / WEIGHTS)) for name in "ab")
    return {name: 0.25 * a[name] + 0.75 * b[name] for name in a}


def check(found, folders):
    tensors = load_file(str(found / WEIGHTS))
    for name, value in expected(folders).items():
        torch.testing.assert_close(tensors[name], value, atol=1e-6, rtol=1e-5)


def test_a_laptop_merges_once_and_serves_what_came_of_it(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("CALOTYPE_DATA_DIR", str(tmp_path))
    found = model_folder(with_merged_source(model(merge_of(folders))))
    check(found, folders)
    assert json.loads((found / "merge.json").read_text())["licence"] == "apache-2.0"
    load_components(found)
    before = (found / WEIGHTS).stat().st_mtime_ns
    assert model_folder(with_merged_source(model(merge_of(folders)))) == found
    assert (found / WEIGHTS).stat().st_mtime_ns == before
    other = with_merged_source(model(merge_of(folders, commercial=True)))
    assert model_folder(other) != found
    with pytest.raises(ModelLoadFailed, match="merged before it is loaded"):
        model_folder(model(merge_of(folders)))


def test_paths_of_inputs_are_relative_to_the_manifest(folders, tmp_path):
    source = merge_of(pathlib.Path("models"))
    document = {"apiVersion": "calotype.dev/v1alpha1", "kind": "ImageModel",
                "metadata": {"name": "mixed"}, "spec": {"source": source}}  # fmt: skip
    file = tmp_path / "mixed.yaml"
    file.write_text(yaml.safe_dump(document))
    merge = read_manifests([file]).models[0].spec.source.merge
    assert merge is not None
    assert [one.source.path for one in merge.inputs] == [
        str(tmp_path / "models" / name) for name in "ab"
    ]


def test_a_service_on_this_machine_is_told_the_path_of_what_was_merged(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setenv("CALOTYPE_DATA_DIR", str(tmp_path / "data"))
    file = tmp_path / "mixed.yaml"
    document = {"apiVersion": "calotype.dev/v1alpha1", "kind": "ImageModel",
                "metadata": {"name": "mixed"}, "spec": {"source": merge_of(folders)}}  # fmt: skip
    file.write_text(yaml.safe_dump(document))
    source = read_resources([file]).models[0].spec.source
    assert source.merge is None and source.path is not None
    check(pathlib.Path(source.path), folders)
    document["spec"]["source"]["merge"]["inputs"][1]["source"] = {"s3": {"uri": "s3://models/b/"}}
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ManifestError, match=r"mixed: spec.source.merge .model 2 of the merge. is"):
        read_resources([file])


def test_a_cluster_fetches_the_inputs_and_merges_them_in_the_job(folders, tmp_path):
    mixed = model(merge_of(folders))
    assert is_fetched(mixed.spec.source)
    owner = {"metadata": {"name": "mixed", "namespace": "default", "uid": "1"}}
    task = fetch_task(owner, mixed, "", 1)
    content = json.loads(task.order.to_json()) | {"cacheDir": str(tmp_path)}
    order = FetchOrder.model_validate(content)
    said: list[str] = []
    fetched = run_order(order, said.append)
    check(fetched.path, folders)
    assert fetched.path.is_relative_to(order.folder) and len(fetched.sha256) == 64
    assert "writing shard 1 of 1" in said
    again = run_order(order, said.append)
    assert again == fetched and said.count("writing shard 1 of 1") == 1


def test_licences_that_forbid_a_merge_are_the_jobs_answer(folders, tmp_path):
    source = merge_of(folders)
    source["merge"]["inputs"][1]["licence"] = "gpl-3.0"
    source["merge"]["inputs"][0]["licence"] = "flux-2-dev-non-commercial-license"
    order = FetchOrder.model_validate(
        {"kind": "model", "name": "mixed", "source": source, "cacheDir": str(tmp_path)}
    )
    with pytest.raises(FetchFailed, match=r"is under gpl-3\.0") as caught:
        run_order(order, lambda sentence: None)
    assert caught.value.code == "LicenceNotAllowed"
    with pytest.raises(InvalidRequest):
        with_merged_source(model(source))


def test_the_secret_has_what_any_of_the_inputs_needs():
    inputs = [{"source": {"huggingFace": {"repo": "a/b"}}, "licence": "mit"},
              {"source": {"s3": {"uri": "s3://models/b/"}}, "licence": "mit"}]  # fmt: skip
    source = ModelSource.model_validate({"merge": {"method": "slerp", "inputs": inputs}})
    keys = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert credential_keys(source) == keys


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "ties"}, "name source.merge.base for these methods only"),
        ({"base": {"source": {"path": "/x"}, "licence": "mit"}}, "source.merge.base"),
        ({"inputs": [{"source": {"path": "/x"}, "licence": "mit"}]}, "two inputs, or one and"),
        ({"inputs": [{"source": {"path": "/x"}}] * 2}, "licence"),
        ({"inputs": [{"source": {"persistentVolumeClaim": {"claimName": "v"}}, "licence": "mit"}]
          * 2}, "cannot be on a volume of its own"),
        ({"density": 0}, "density"),
    ],
)  # fmt: skip
def test_what_a_manifest_may_not_say(folders, change, says):
    with pytest.raises(ValidationError, match=says):
        model(merge_of(folders, **change))
