"""What a machine without a cluster makes of manifests that were written for one."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import yaml
from samples.valid_manifests import REMOVED, VALID, changed, manifest

from calotype.serving.config import (
    ImageModel,
    LoRATraining,
    ManifestError,
    Manifests,
    Team,
    bytes_of,
    load_manifests,
)
from calotype.serving.config.namespaces import LabelSelector
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.preparation import check_policies, declare_teams, moderation_of

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples"
MODEL = changed(VALID["ImageModel"], "spec.moderationPolicyRef", REMOVED)
ADAPTER = manifest(
    "LoRAAdapter",
    "sneaker",
    {"modelRef": {"name": "flux-2-dev"}, "source": {"path": "sneaker.safetensors"}},
)
STRICT = VALID["ModerationPolicy"]


def load(folder: pathlib.Path, *documents: Any) -> Manifests:
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return load_manifests([file])


def test_the_examples_are_served_here_as_they_are() -> None:
    found = load_manifests([EXAMPLES])
    assert [model.name for model in found.models] == ["shapes"]
    assert [adapter.name for adapter in found.adapters] == ["stripes"]
    assert list(found.policies) == ["house-rules"]
    assert [(team.name, team.spec.weight, team.spec.models) for team in found.teams] == [
        ("web-shop", 2, ["shapes"])
    ]


def test_every_field_of_every_kind_is_kept(tmp_path: pathlib.Path) -> None:
    found = load(tmp_path, MODEL, VALID["Team"], VALID["LoRATraining"])
    for given, read in ((MODEL, found.models[0]), (VALID["Team"], found.teams[0])):
        dumped = read.model_dump(mode="json", by_alias=True)
        assert given["spec"].items() <= flat_defaults(given["spec"], dumped["spec"]).items()
    assert isinstance(found.models[0], ImageModel)
    assert isinstance(found.teams[0], Team)
    assert isinstance(found.trainings[0], LoRATraining)


def flat_defaults(given: Any, dumped: Any) -> Any:
    """The dumped value without what was not given."""
    if isinstance(given, dict) and isinstance(dumped, dict):
        return {key: flat_defaults(value, dumped[key]) for key, value in given.items()}
    return dumped


def test_trainings_are_passed_over_with_a_word(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(tmp_path, MODEL, VALID["LoRATraining"])
    assert "LoRATraining sneaker-style is passed over: trainings run in a cluster" in caplog.text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"s3": {"uri": "s3://models/flux/"}}, "spec.source.s3 is fetched by the operator"),
        ({"http": {"url": "https://a.example.com/m.tar"}}, "spec.source.http is fetched by"),
        (
            {"persistentVolumeClaim": {"claimName": "weights"}},
            "spec.source.persistentVolumeClaim is fetched by",
        ),
        (
            {"provider": {"name": "openai", "model": "gpt-image-1"}},
            "spec.source.provider is called by a cluster's gateway only",
        ),
    ],
)
def test_a_source_that_only_a_cluster_has_is_refused_with_what_to_write(
    tmp_path: pathlib.Path, source: dict[str, Any], says: str
) -> None:
    with pytest.raises(ManifestError, match=f"ImageModel flux-2-dev: {says}") as caught:
        load(tmp_path, changed(MODEL, "spec.source", source))
    assert "path" in caught.value.message


def test_what_is_suspended_is_not_served(tmp_path: pathlib.Path) -> None:
    second = changed(MODEL, "metadata.name", "klein")
    asleep = changed(second, "spec.suspend", True)
    other = changed(changed(ADAPTER, "spec.modelRef.name", "klein"), "metadata.name", "other")
    quiet = changed(changed(ADAPTER, "spec.suspend", True), "metadata.name", "quiet")
    found = load(tmp_path, MODEL, asleep, ADAPTER, other, quiet)
    assert [model.name for model in found.models] == ["flux-2-dev"]
    assert [adapter.name for adapter in found.adapters] == ["sneaker"]
    with pytest.raises(ManifestError, match=r"Every ImageModel given says suspend: true"):
        load(tmp_path, asleep)


def named(document: Any, policy: str) -> Any:
    return changed(document, "spec.moderationPolicyRef", {"name": policy})


def called(policy: str, block: float | None = None) -> Any:
    found = changed(STRICT, "metadata.name", policy)
    rules = {"sexual": {"text": {"block": 0.5 if block is None else block}}}
    return changed(found, "spec.categories", rules)


def test_a_policy_that_is_named_must_be_there(tmp_path: pathlib.Path) -> None:
    for document in (MODEL, ADAPTER, VALID["Team"]):
        others = [other for other in (MODEL, called("another")) if other is not document]
        with pytest.raises(
            ManifestError, match=r"'gone', but the policies given are \['another'\]"
        ):
            load(tmp_path, named(document, "gone"), *others)


def test_each_model_is_checked_by_its_own_policy(tmp_path: pathlib.Path) -> None:
    def base(*documents: Any) -> list[Any]:
        found = load(tmp_path, *documents)
        configs = [moderation_of(model, found) for model in found.models]
        return [config.policy.name if config.policy else None for config in configs]

    default, lax = called("default"), called("another")
    second = changed(MODEL, "metadata.name", "klein")
    assert base(lax, default, STRICT, named(MODEL, "strict")) == ["strict"]
    assert base(lax, default, STRICT, MODEL) == ["default"]
    assert base(lax, MODEL) == ["another"]
    assert base(MODEL) == [None]
    both = [named(MODEL, "strict"), named(second, "another")]
    assert base(lax, STRICT, *both) == ["strict", "another"]
    team = named(VALID["Team"], "another")
    assert base(lax, MODEL, team) == [None], "a team's policy is not the model's"


def test_policies_of_teams_and_adapters_go_along(tmp_path: pathlib.Path) -> None:
    kids, brand = called("kids", 0.2), called("brand", 0.4)
    adapter, team = (
        named(ADAPTER, "brand"),
        changed(named(VALID["Team"], "kids"), "spec.models", []),
    )
    found = load(tmp_path, MODEL, adapter, team, kids, brand, called("default"))
    check_policies(found)
    moderation = moderation_of(found.models[0], found)
    assert set(moderation.policies) == {"kids", "brand"}
    elsewhere = changed(team, "spec.models", ["klein"])
    found = load(tmp_path, MODEL, elsewhere, kids, called("default"))
    assert moderation_of(found.models[0], found).policies == {}


def test_teams_have_what_their_manifests_say_while_these_are_there(tmp_path: pathlib.Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    team = Team.model_validate(named(VALID["Team"], "kids"))
    declare_teams(database, [], [team])
    found = database.teams.ensure_team(team.name)
    assert (found.policy, found.weight, found.requests_per_minute) == ("kids", 2.0, 60)
    assert found.allowed_models == ["flux-2-dev"]
    declare_teams(database, [team], [Team.model_validate(VALID["Team"])])
    assert database.teams.ensure_team(team.name).policy is None
    declare_teams(database, [team], [])
    left = database.teams.ensure_team(team.name)
    assert (left.policy, left.weight, left.requests_per_minute) == (None, 1.0, None)
    assert left.allowed_models is None
    database.close()


def test_a_laxer_policy_is_refused_with_its_field(tmp_path: pathlib.Path) -> None:
    team = changed(named(VALID["Team"], "lax"), "spec.models", [])
    found = load(tmp_path, MODEL, team, called("lax", 0.9), called("default", 0.4))
    with pytest.raises(InvalidRequest) as caught:
        check_policies(found)
    said = str(caught.value)
    assert f"Team {team['metadata']['name']}: ModerationPolicy lax is laxer than 'default'" in said
    assert "categories.sexual.text.block is 0.9, above 0.4" in said


def test_one_name_in_two_namespaces_is_one_too_many(tmp_path: pathlib.Path) -> None:
    elsewhere = changed(MODEL, "metadata.namespace", "other")
    with pytest.raises(ManifestError, match="ImageModel flux-2-dev stands in two namespaces"):
        load(tmp_path, MODEL, elsewhere)


def test_a_resource_is_declared_once(tmp_path: pathlib.Path) -> None:
    for document in (MODEL, ADAPTER, STRICT, VALID["Team"]):
        with pytest.raises(ManifestError, match=r"document 2: .* is declared before, in .*1; rem"):
            load(tmp_path, document, document)
    load(tmp_path, MODEL)
    twice = load_manifests([tmp_path, tmp_path / "given.yaml"])
    assert len(twice.models) == 1, "one file named twice is one file"


def test_a_model_of_another_namespace_is_found_by_its_name(tmp_path: pathlib.Path) -> None:
    away = changed(ADAPTER, "spec.modelRef.namespace", "calotype")
    assert load(tmp_path, MODEL, away).adapters, "the manifest leaves the namespace to kubectl"
    with pytest.raises(ManifestError, match=r"'calotype', but the ImageModel .* is in 'elsewhere'"):
        load(tmp_path, changed(MODEL, "metadata.namespace", "elsewhere"), away)


def test_an_object_taken_from_a_cluster_is_read(tmp_path: pathlib.Path) -> None:
    taken = MODEL | {"status": {"phase": "Ready"}}
    taken = changed(taken, "metadata.uid", "0d1c")
    (model,) = load(tmp_path, taken).models
    assert "status" not in model.model_dump()


def test_null_is_a_field_that_is_not_there(tmp_path: pathlib.Path) -> None:
    without = changed(MODEL, "spec.replicas", REMOVED)
    nulls = changed(changed(MODEL, "spec.replicas", None), "spec.source.path", None)
    assert load(tmp_path, nulls).models == load(tmp_path, without).models


def test_what_yaml_has_and_json_has_not(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "given.yaml"
    text = yaml.safe_dump(changed(ADAPTER, "spec.triggerWords", ["WORD"]))
    file.write_text(text.replace("WORD", "2026-11-23"))
    assert load_manifests([file]).adapters[0].spec.trigger_words == ["2026-11-23"]
    for wrong in (".nan", ".inf"):
        file.write_text(
            yaml.safe_dump(MODEL).replace("guidanceScale: 4.0", f"guidanceScale: {wrong}")
        )
        with pytest.raises(ManifestError, match=r"spec\.defaults\.guidanceScale"):
            load_manifests([file])
    file.write_text(json.dumps(MODEL)[:-1] + ', "metadata": &a {"name": "x", "labels": *a}}')
    with pytest.raises(ManifestError, match="cannot be written as JSON"):
        load_manifests([file])


@pytest.mark.parametrize(
    ("quantity", "size"),
    [("8Gi", 8 * 2**30), ("500M", 500_000_000), ("1.5k", 1500), ("12", 12), ("0.5", 1)],
)
def test_amounts_are_bytes(quantity: str, size: int) -> None:
    assert bytes_of(quantity) == size


@pytest.mark.parametrize("quantity", ["", "8 Gi", "-1Gi", "0", "8GB", "1e3", "m", "9" * 40])
def test_what_is_no_amount_says_what_one_is(quantity: str) -> None:
    with pytest.raises(ValueError, match="for example 8Gi"):
        bytes_of(quantity)


def test_a_number_of_bytes_needs_no_quotes(tmp_path: pathlib.Path) -> None:
    (model,) = load(tmp_path, changed(MODEL, "spec.adapters.memoryBudget", 1024)).models
    assert model.spec.adapters.memory_budget == "1024"
    with pytest.raises(ManifestError, match="an amount is a number above 0"):
        load(tmp_path, changed(MODEL, "spec.adapters.memoryBudget", True))


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        ({"images": "allowed", "tier": "a"}, True),
        ({"images": "allowed", "tier": "b"}, True),
        ({"images": "allowed", "tier": "c"}, False),
        ({"images": "allowed", "tier": "a", "closed": "yes"}, False),
        ({"images": "denied", "tier": "a"}, False),
        ({"images": "allowed"}, False),
        ({}, False),
    ],
)
def test_a_selector_chooses_as_kubernetes_does(labels: dict[str, str], chosen: bool) -> None:
    selector = LabelSelector.model_validate(
        {
            "matchLabels": {"images": "allowed"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]},
                {"key": "tier", "operator": "Exists"},
                {"key": "closed", "operator": "DoesNotExist"},
                {"key": "images", "operator": "NotIn", "values": ["maybe"]},
            ],
        }
    )
    assert selector.matches(labels) is chosen


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: pathlib.Path) -> None:
    probe = (
        "import sys\n"
        "from calotype.serving.config import load_manifests\n"
        "from calotype.serving.core.errors import CalotypeError\n"
        "from calotype.serving.weights.sources import adapter_file, model_folder\n"
        "found = load_manifests([__import__('pathlib').Path(sys.argv[1])])\n"
        "for fetch, what in ((model_folder, found.models), (adapter_file, found.adapters)):\n"
        "    try:\n"
        "        fetch(what[0])\n"
        "    except CalotypeError as error:\n"
        "        print(error.message)\n"
    )
    sneaker = changed(
        ADAPTER, "spec.source", {"huggingFace": {"repo": "acme/loras", "filename": "a.safetensors"}}
    )
    load(tmp_path, MODEL, sneaker)
    # The library reads its settings when it is imported, so they need a process of their own.
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    said = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "given.yaml")],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    model, adapter = said.stdout.splitlines()
    assert model.startswith("black-forest-labs/FLUX.2-dev (revision main) could not be fetched")
    assert adapter.startswith("acme/loras (revision main) could not be fetched")
    for sentence in (model, adapter):
        assert sentence.endswith(
            "download the repository elsewhere and write source: {path: FOLDER}."
        )
