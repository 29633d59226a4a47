"""Documents between processes: what one writes, the other reads; newer ones are kept or refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from pydantic import ValidationError

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, Quotas, Source
from calotype.serving.wire.application import (
    DispatcherConfig,
    GeneratorConfig,
    ModeratorConfig,
    NamedPolicy,
    TextEncoderConfig,
)
from calotype.serving.wire.config_hash import config_hash
from calotype.serving.wire.document import Document
from calotype.serving.wire.fetch_order import FetchOrder, LicenceAnswer
from calotype.serving.wire.fetch_result import FetchedWeights, FetchRefused
from calotype.serving.wire.gateway_config import GatewayConfig, ServedModel
from calotype.serving.wire.gateway_teams import DeclaredTeam, GatewayTeams
from calotype.serving.wire.model_status import AdapterState, ModelAppStatus, ReplicaState
from calotype.serving.wire.training_progress import TrainingProgress

POLICY = {"version": 1, "categories": {"sexual": {"text": {"block": 0.2}}}}
DOCUMENTS: list[Document] = [
    FetchOrder(
        kind="adapter",
        name="sneaker",
        namespace="shoes",
        source=Source.model_validate({"builtIn": {"name": "stripes"}}),
        sha256="a" * 64,
        cache_dir=pathlib.Path("/var/lib/calotype/cache"),
        max_bytes=1000,
        max_rank=64,
        model=BUILT_IN_MODEL,
        volume_dir=pathlib.Path("/source"),
        licence=LicenceAnswer(name="apache-2.0", accepted=True),
    ),
    FetchedWeights(
        revision="main", sha256="b" * 64, size_bytes=3, path="/a", rank=8, target_modules=("q", "k")
    ),
    FetchRefused(reason="NotFound", message="There is none."),
    GatewayConfig(
        models=[ServedModel(manifest=BUILT_IN_MODEL, url="http://shapes:8000", ready=True)],
        adapters=[BUILT_IN_ADAPTER],
        default_model="shapes",
    ),
    GatewayTeams(
        teams=[
            DeclaredTeam(
                name="shoes",
                uid="3e0c1f0a",
                takes_over=True,
                quotas=Quotas(requests_per_minute=60),
                models=["shapes"],
                moderation_policy="strict",
                key_hashes=["c" * 64],
            ),
            DeclaredTeam(name="bags", refusal="Its policy is laxer."),
        ],
    ),
    ModelAppStatus(
        name="shapes",
        ready=True,
        replicas=1,
        queue_seconds=1.5,
        config_hash="0123456789abcdef",
        adapters={"stripes": "ready"},
        replica_states=(
            ReplicaState(
                replica="r1",
                node="n1",
                ready=True,
                engine={"device": "cpu"},
                adapters={"stripes": AdapterState(state="ready", load_milliseconds=12.0)},
            ),
        ),
    ),
    TrainingProgress(step=3, loss=0.5, eta_seconds=60, samples=[{"step": 1}]),
    DispatcherConfig(model="shapes"),
    ModeratorConfig(policy=NamedPolicy(name="strict", spec=POLICY), policies={"kids": POLICY}),
    TextEncoderConfig(model=BUILT_IN_MODEL),
    GeneratorConfig(model=BUILT_IN_MODEL, adapters=[BUILT_IN_ADAPTER]),
]
each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: type(d).__name__)


@each
def test_what_is_written_is_read_again(document: Document) -> None:
    again = type(document).model_validate_json(document.to_json())
    assert again.payload() == document.payload()
    assert again.payload()["version"] == 1


@each
def test_fields_of_a_newer_writer_are_kept(document: Document) -> None:
    newer = document.payload() | {"laterField": {"a": [1]}}
    assert type(document).model_validate(newer).payload() == newer


@each
def test_a_higher_version_is_refused(document: Document) -> None:
    with pytest.raises(ValidationError, match=r"version 2.*reads up to 1"):
        type(document).model_validate(document.payload() | {"version": 2})


@each
def test_a_document_from_before_there_were_versions_is_read(document: Document) -> None:
    older = document.payload()
    del older["version"]
    assert type(document).model_validate(older).payload() == document.payload()


def test_manifests_are_written_as_they_were_given() -> None:
    """A thousand adapters must fit into one ConfigMap: no default is written out."""
    adapter: dict[str, Any] = {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": "a", "namespace": "n", "annotations": {"calotype.dev/revision": "x"}},
        "spec": {"modelRef": {"name": "shapes"}, "source": {"path": "/a"}},
    }
    config = GatewayConfig.model_validate({"adapters": [adapter]})
    assert config.payload()["adapters"] == [adapter]


def test_a_hash_outlives_the_way_through_kubernetes() -> None:
    """Keys come back in another order, and 4.0 as 4."""
    config = GeneratorConfig(model=BUILT_IN_MODEL, adapters=[BUILT_IN_ADAPTER]).payload()
    shuffled = json.loads(json.dumps(config, sort_keys=True).replace("4.0", "4"))
    assert config_hash(shuffled) == config_hash(config)
    assert config_hash(shuffled | {"adapters": []}) != config_hash(config)
