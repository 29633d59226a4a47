"""What an operator orders becomes a run, and HTTP says how far it is."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import httpx
import pytest
from samples.training_run import RECIPE, make_trainer

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.model.components import Components
from calotype.serving.training.lora.reporting import PrometheusSink
from calotype.serving.training.lora.worker import PATH, read_order, serving_progress
from calotype.serving.wire.training_progress import TrainingProgress


def order(folder: pathlib.Path, **spec: object) -> pathlib.Path:
    document = {
        "name": "shoes",
        "namespace": "team",
        "spec": {
            "modelRef": {"name": "shapes"},
            "dataset": {"persistentVolumeClaim": {"claimName": "pictures", "path": "shoes"}},
            "caption": {"triggerWord": "zorbl"},
            "steps": 40,
            "rank": 4,
            "resolution": 128,
            **spec,
        },
        "model": {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "ImageModel",
            "metadata": {"name": "shapes"},
            "spec": {"source": {"builtIn": {"name": "shapes"}}, "defaults": {"size": "128x128"}},
        },
        "outputDir": str(folder / "out"),
        "volumeDir": "/var/lib/calotype/source",
    }
    path = folder / "training.json"
    path.write_text(json.dumps(document))
    return path


def test_an_order_becomes_a_run(tmp_path: pathlib.Path) -> None:
    run = read_order(order(tmp_path))
    assert run.source == "/var/lib/calotype/source/shoes"
    assert run.output == tmp_path / "out" / "adapter.safetensors"
    assert (run.recipe.steps, run.recipe.rank, run.recipe.resolutions) == (40, 4, (128,))
    assert run.trigger == "zorbl"
    bucket = read_order(order(tmp_path, dataset={"s3": {"uri": "s3://pictures/shoes/"}}))
    assert bucket.source == "s3://pictures/shoes/"


def test_an_order_that_cannot_be_run_is_refused(tmp_path: pathlib.Path) -> None:
    web = {"http": {"url": "https://example.com/pictures.zip"}}
    with pytest.raises(InvalidRequest, match=r"spec\.dataset"):
        read_order(order(tmp_path, dataset=web))
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="no order of a training"):
        read_order(tmp_path / "training.json")


def test_http_says_how_far_a_run_is(components: Components, tmp_path: pathlib.Path) -> None:
    metrics = PrometheusSink("shapes")
    with serving_progress(tmp_path, metrics, "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        assert TrainingProgress.model_validate_json(httpx.get(url + PATH).content).step is None
        recipe = dataclasses.replace(RECIPE, checkpoint_every=3)
        trainer = make_trainer(
            components, tmp_path, recipe, stopping=lambda: trainer.step == 3, sinks=(metrics,)
        )
        trainer.run()
        told = TrainingProgress.model_validate_json(httpx.get(url + PATH).content)
        assert told.step == 3
        assert told.loss is not None
        assert told.eta_seconds is not None
        shown = httpx.get(url + "/metrics").text
        assert 'calotype_training_step{model="shapes"} 3.0' in shown
        assert 'calotype_training_steps{model="shapes"} 7.0' in shown
        assert httpx.get(url + "/other").status_code == 404
