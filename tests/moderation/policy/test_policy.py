"""What a policy document may say, and what is said when it says something else."""

import pathlib
from typing import Any

import pytest
import yaml

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.categories import OPENAI_CATEGORIES, Category, Modality, Verdict
from calotype.moderation.policy.policy import POLICIES, Policy
from calotype.moderation.policy.rules import Rule


def spec(**changes: Any) -> dict[str, Any]:
    return {"version": 3, "categories": {"sexual": {"text": {"block": 0.5}}}, **changes}


def test_default_policy_is_strict() -> None:
    policy = Policy.default()
    assert policy.identity == "default@1"
    assert len(policy.sha256) == 64
    assert policy.on_error == "block"
    for category in (
        Category.SEXUAL,
        Category.VIOLENCE_GRAPHIC,
        Category.SELF_HARM,
    ):
        assert policy.rule(category, Modality.TEXT).block is not None
        assert policy.rule(category, Modality.IMAGE).block is not None
    assert policy.rule(Category.HATE, Modality.TEXT).block is None
    assert "hate" in policy.lists


def test_the_wire_has_openais_thirteen_names() -> None:
    assert len(OPENAI_CATEGORIES) == 13
    assert OPENAI_CATEGORIES[-1] == "violence/graphic"
    assert "shocking" not in OPENAI_CATEGORIES


def test_manifest_and_bare_file_are_the_same_policy(tmp_path: pathlib.Path) -> None:
    bare, manifest = tmp_path / "strict.yaml", tmp_path / "manifest.yaml"
    bare.write_text(yaml.safe_dump(spec()))
    manifest.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "calotype.dev/v1alpha1",
                "kind": "ModerationPolicy",
                "metadata": {"name": "strict"},
                "spec": spec(),
            }
        )
    )
    from_bare, from_manifest = Policy.load(bare), Policy.load(manifest)
    assert from_bare.identity == from_manifest.identity == "strict@3"
    assert from_bare.sha256 == from_manifest.sha256 == Policy.from_spec("strict", spec()).sha256


def test_every_change_changes_the_digest() -> None:
    changed = spec(categories={"sexual": {"text": {"block": 0.6}}})
    assert Policy.from_spec("a", spec()).sha256 != Policy.from_spec("a", changed).sha256


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"version": 0}, "version", "greater than or equal to 1"),
        ({"categories": {"sexual": {"text": {"block": 1.5}}}}, "categories.sexual.text.block", "1"),
        ({"categories": {"sexual": {"text": {"blok": 0.5}}}}, "text.blok", "not permitted"),
        ({"categories": {"nudity": {}}}, "categories.nudity", "'sexual'"),
        ({"categories": {}}, "categories", "at least 1"),
        ({"lists": ["sexual", "sexuel"]}, "lists", "'sexuel'"),
        ({"onError": "allow"}, "onError", "'block' or 'review'"),
        ({"timeoutSeconds": -1}, "timeoutSeconds", "greater than 0"),
        ({"tresholds": {}}, "tresholds", "not permitted"),
        (
            {"categories": {"sexual": {"text": {"flag": 0.9, "block": 0.5}}}},
            "categories.sexual.text",
            "flag must not be above block",
        ),
    ],
)
def test_wrong_document_names_file_and_field(
    tmp_path: pathlib.Path, changes: dict[str, Any], field: str, reason: str
) -> None:
    path = tmp_path / "team.yaml"
    path.write_text(yaml.safe_dump(spec(**changes)))
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    sentence = str(caught.value)
    assert str(path) in sentence and field in sentence and reason in sentence
    assert "\n" not in sentence and sentence.endswith(".")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- a list", "must be a mapping"),
        (b"version: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"kind: ModerationPolicy\nspec: {}", "metadata.name is missing"),
        (b"kind: ModerationPolicy\nmetadata: {name: a}", "spec is missing"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path: pathlib.Path, content: bytes, reason: str) -> None:
    path = tmp_path / "team.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=reason):
        Policy.load(path)


def test_missing_file_is_named() -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.yaml: cannot be read"):
        Policy.load("nowhere.yaml")


def test_most_severe_threshold_wins() -> None:
    rule = Rule(block=0.9, review=0.7, flag=0.5)
    assert rule.verdict(0.95) == (Verdict.BLOCK, 0.9)
    assert rule.verdict(0.9) == (Verdict.BLOCK, 0.9)
    assert rule.verdict(0.8) == (Verdict.REVIEW, 0.7)
    assert rule.verdict(0.6) == (Verdict.FLAG, 0.5)
    assert rule.verdict(0.4) is None


def test_only_allow_and_flag_are_served() -> None:
    assert {verdict for verdict in Verdict if verdict.served} == {Verdict.ALLOW, Verdict.FLAG}


def test_every_shipped_policy_loads() -> None:
    for path in POLICIES.glob("*.yaml"):
        assert Policy.load(path).name == path.stem


def extending(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "extends": "floor", "categories": {"violence": {}}, **changes}


def test_what_an_extending_policy_leaves_out_comes_from_below() -> None:
    policy = Policy.from_spec("house", extending())
    floor = Policy.packaged("floor")
    for modality in Modality:
        category = Category.SEXUAL_MINORS
        assert policy.rule(category, modality) == floor.rule(category, modality)
    assert "minors" in policy.lists
    assert policy.messages[Category.SEXUAL_MINORS]
    assert policy.sha256 != Policy.from_spec("house", extending(categories={"hate": {}})).sha256


def test_a_floor_may_be_made_stricter() -> None:
    stricter = extending(categories={"sexual/minors": {"image": {"block": 0.2}}}, lists=["hate"])
    policy = Policy.from_spec("house", stricter)
    assert policy.rule(Category.SEXUAL_MINORS, Modality.IMAGE).block == 0.2
    assert policy.rule(Category.SEXUAL_MINORS, Modality.TILE).block == 0.5
    assert set(policy.lists) == {"minors", "hate"}
    above_flag = extending(
        extends="default", categories={"sexual": {"text": {"block": 0.1}}}, version=2
    )
    assert Policy.from_spec("house", above_flag).rule(Category.SEXUAL, Modality.TEXT).block == 0.1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"categories": {"sexual/minors": {"image": {"block": 0.9}}}},
            "categories.sexual/minors.image.block is 0.9, above 0.5",
        ),
        (
            {"extends": "default", "categories": {"sexual": {"tile": {"block": 1.0}}}},
            "categories.sexual.tile.block is 1.0, above 0.82",
        ),
        (
            {"extends": "default", "categories": {"self-harm": {"text": {"block": 0.81}}}},
            "categories.self-harm.text.block is 0.81, above 0.8",
        ),
    ],
)
def test_a_floor_cannot_be_loosened(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError, match="looser than the policy") as caught:
        Policy.from_spec("house", extending(**changes))
    assert field in str(caught.value)


def test_the_packages_policy_stands_on_its_floor() -> None:
    assert Policy.default().extends == "floor"
