"""Several policies at once, and levels that callers ask for: nothing gets laxer than it may."""

import itertools
import random
from typing import Any

import pytest

from calotype.moderation.decision import Decision
from calotype.moderation.errors import PolicyError
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.combination import strictest
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rulebook import Scope
from calotype.moderation.policy.rules import EFFECTS, Rule
from calotype.moderation.policy.strictness import laxer_at
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier


def policy(name: str, version: int = 1, **changes: Any) -> Policy:
    rules = {"sexual": {"text": {"block": 0.5}}}
    return Policy.from_spec(name, {"version": version, "categories": rules, **changes})


BASE = policy("base")
KIDS = policy("kids", 3, categories={"sexual": {"text": {"block": 0.1, "flag": 0.05}}})
CALM = policy(
    "calm",
    categories={"sexual": {"text": {"block": 0.5}}, "violence": {"text": {"review": 0.2}}},
    terms=[{"category": "ip_character", "terms": ["captain calotype"]}],
)


def stage(score: float, **named: Policy) -> Moderator:
    scores = {"sexual": score, "violence": score}
    moderator = Moderator(
        BASE,
        text_classifiers=[FixedTextClassifier(scores)],
        image_classifiers=[FixedImageClassifier({"sexual": 0.0})],
    )
    moderator.reconfigure(BASE, named)
    return moderator


def checked(moderator: Moderator, *names: str, wish: str | None = None) -> Decision:
    return moderator.check_prompt("a hat", Scope(names, wish))


def test_one_that_covers_the_others_is_checked_by_alone() -> None:
    moderator = stage(0.3, kids=KIDS, calm=CALM)
    assert checked(moderator).policy == "base@1"
    assert checked(moderator).verdict is Verdict.ALLOW
    decision = checked(moderator, "kids")
    assert (decision.policy, decision.policy_sha256) == ("kids@3", KIDS.sha256)
    assert decision.verdict is Verdict.BLOCK


def test_the_strictest_of_all_has_one_name_and_one_digest() -> None:
    moderator = stage(0.3, kids=KIDS, calm=CALM)
    first, second = checked(moderator, "calm", "kids"), checked(moderator, "calm", "kids")
    assert first.policy == second.policy == "calm@1+kids@3+base@1"
    assert first.policy_sha256 == second.policy_sha256
    assert first.policy_sha256 not in (KIDS.sha256, CALM.sha256, BASE.sha256)
    assert set(first.categories) == {Category.SEXUAL, Category.VIOLENCE}
    assert moderator.check_prompt("Captain Calotype", Scope(("calm",))).blocked
    assert not stage(0.0).check_prompt("Captain Calotype").blocked


def test_a_policy_that_is_laxer_changes_nothing() -> None:
    lax = policy("lax", categories={"sexual": {"text": {"block": 0.9}}})
    decision = checked(stage(0.6, lax=lax), "lax")
    assert decision.policy == "base@1" and decision.verdict is Verdict.BLOCK


def test_a_policy_that_is_not_there_refuses() -> None:
    decision = checked(stage(0.0, kids=KIDS), "kids", "gone")
    assert decision.verdict is Verdict.ERROR and decision.unavailable
    assert "ModerationPolicy gone" in (decision.reason or "")


def test_whatever_is_put_together_is_as_strict_as_each_part() -> None:
    chance = random.Random(7)
    for _ in range(300):
        made = []
        for name in ("one", "two", "three"):
            rules: dict[str, Any] = {}
            for category, modality in itertools.product(("sexual", "hate"), ("text", "image")):
                limits = {e: chance.randint(1, 9) / 10 for e in EFFECTS if chance.random() < 0.5}
                if "flag" in limits:
                    limits["flag"] = min(limits["flag"], limits.get("block", 1.0))
                rules.setdefault(category, {})[modality] = limits
            made.append(policy(name, categories=rules))
        whole = strictest(made)
        assert [laxer_at(whole, part) for part in made] == [None, None, None]
        for part, score in itertools.product(made, (0.05, 0.25, 0.55, 0.95)):
            rule = part.categories[Category.SEXUAL].text
            ours = whole.categories[Category.SEXUAL].text
            assert _severity(ours, score) >= _severity(rule, score)


def _severity(rule: Rule, score: float) -> int:
    """Of what is not served; a flag is no strictness."""
    effect = rule.verdict(score)
    return 0 if effect is None or effect[0].served else effect[0].severity


LEVELS = policy(
    "levels",
    extends="floor",
    categories={"sexual": {"text": {"block": 0.5}}, "violence": {"text": {"block": 0.5}}},
    presets={
        "strict": {"tolerances": [1], "categories": {"sexual": {"text": {"block": 0.2}}}},
        "low": {"tolerances": [3, 4], "categories": {"violence": {"text": {"block": 0.8}}}},
    },
)


@pytest.mark.parametrize(
    ("wish", "preset", "whole", "blocked"),
    [
        (None, None, True, {"violence", "sexual"}),
        ("2", "auto", True, {"violence", "sexual"}),
        ("low", "low", True, {"sexual"}),
        ("3", "low", True, {"sexual"}),
        ("6", "low", False, {"sexual"}),
        ("1", "strict", True, {"violence", "sexual"}),
        ("0", "strict", False, {"violence", "sexual"}),
    ],
)
def test_a_wish_gets_the_nearest_level_that_is_granted(
    wish: str | None, preset: str | None, whole: bool, blocked: set[str]
) -> None:
    moderator = stage(0.6)
    moderator.reconfigure(LEVELS)
    decision = checked(moderator, wish=wish)
    assert {category.value for category in decision.categories} == blocked
    assert (decision.preset, decision.granted, decision.asked) == (preset, whole, wish)
    assert (decision.policy, decision.policy_sha256) == ("levels@1", LEVELS.sha256)


def test_stricter_levels_are_stricter() -> None:
    moderator = stage(0.3)
    moderator.reconfigure(LEVELS)
    assert not checked(moderator).blocked and checked(moderator, wish="1").blocked


def test_a_team_that_grants_nothing_is_not_loosened_by_the_model() -> None:
    moderator = stage(0.6)
    team = policy("team", categories={"violence": {"text": {"block": 0.5}}})
    moderator.reconfigure(LEVELS, {"team": team})
    decision = checked(moderator, "team", wish="low")
    assert Category.VIOLENCE in decision.categories
    assert not decision.granted and decision.preset == "auto+low"


@pytest.mark.parametrize(
    ("presets", "reason"),
    [
        ({"low": {"tolerances": [2]}}, "low.tolerances: 2 is not possible: low may have 3 to 6"),
        ({"strict": {"tolerances": [4]}}, "strict may have 0 and 1"),
        ({"low": {"tolerances": [3]}, "lowest": {"tolerances": [3]}}, "stands for low already"),
        (
            {"strict": {"tolerances": [1], "categories": {"sexual": {"text": {"block": 0.9}}}}},
            "strict: categories.sexual.text.block is 0.9, above 0.5: looser than the policy",
        ),
        (
            {"low": {"categories": {"sexual/minors": {"image": {"block": 0.9}}}}},
            "low: categories.sexual/minors.image.block is 0.9, above 0.5: looser than the policy "
            "floor@1",
        ),
        ({"low": {"tolerances": [7]}}, "less than or equal to 6"),
        ({"medium": {}}, "presets.medium"),
    ],
)
def test_wrong_presets_are_named(presets: dict[str, Any], reason: str) -> None:
    same = {"categories": {"violence": {"text": {"block": 0.9}}}}
    whole = {name: same | preset for name, preset in presets.items()}
    with pytest.raises(PolicyError) as caught:
        Policy.from_spec("wrong", {"version": 1, "extends": "floor", **_rules(), "presets": whole})
    assert reason in str(caught.value)


def _rules() -> dict[str, Any]:
    return {"categories": {"sexual": {"text": {"block": 0.5}}}}


def test_callers_loosen_only_what_stands_on_a_floor() -> None:
    low = {"tolerances": [3], "categories": {"sexual": {"text": {"block": 0.9}}}}
    with pytest.raises(PolicyError, match=r"presets\.low: needs extends: floor"):
        policy("alone", presets={"low": low})


def test_what_extends_cannot_be_loosened_by_a_preset() -> None:
    low = {"categories": {"sexual": {"text": {"block": 0.9}}}}
    with pytest.raises(PolicyError, match=r"low: .*looser than the policy default@"):
        Policy.from_spec(
            "house", {"version": 1, "extends": "default", **_rules(), "presets": {"low": low}}
        )


def house(**changes: Any) -> Policy:
    rules = {"violence": {"text": {"block": 0.35}}}
    return Policy.from_spec(
        "house", {"version": 1, "extends": "default", "categories": rules, **changes}
    )


def test_stricter_levels_come_with_what_is_extended_and_laxer_ones_do_not() -> None:
    policy, default = house(), Policy.default()
    assert policy.presets.strict is not None and default.presets.strict is not None
    assert policy.presets.strict.tolerances == default.presets.strict.tolerances
    strict = policy.presets.strict.categories
    assert strict[Category.SEXUAL] == default.presets.strict.categories[Category.SEXUAL]
    assert default.presets.low is not None and policy.presets.low is None
    at_strict = stage(0.3)
    at_strict.reconfigure(policy)
    assert checked(at_strict, wish="1").blocked and not checked(at_strict).blocked
    tightened = house(categories={"violence": {"text": {"block": 0.2}}}).presets.strict
    assert tightened is not None
    assert tightened.categories[Category.VIOLENCE].text.block == 0.2


def test_levels_of_ones_own_are_kept() -> None:
    mine = {"tolerances": [0], "categories": {"violence": {"text": {"block": 0.0}}}}
    policy = house(presets={"strictest": mine})
    assert policy.presets.strictest is not None and policy.presets.strict is not None
    assert policy.presets.strictest.tolerances == (0,)
    assert policy.presets.strict.tolerances == (1,)
    assert house(presets={"strict": mine}).presets.strict.tolerances == (0,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("needed", "where"),
    [
        ({"lists": ["hate"]}, "lists: hate is missing"),
        ({"pictureLists": ["/lists/known.txt"]}, "pictureLists: /lists/known.txt is missing"),
        ({"pictureModels": {"falconsai": "/models/eyes"}}, "pictureModels: falconsai is missing"),
        (
            {"terms": [{"category": "ip_character", "terms": ["captain calotype"]}]},
            "terms: 'captain calotype' of ip_character is missing",
        ),
    ],
)
def test_what_a_policy_lacks_of_another_makes_it_laxer(needed: dict[str, Any], where: str) -> None:
    assert laxer_at(BASE, policy("base", **needed)) == where
    assert laxer_at(policy("base", **needed), BASE) is None


def test_a_term_that_is_only_flagged_need_not_be_repeated() -> None:
    noted = {"category": "ip_character", "terms": ["captain calotype"], "action": "flag"}
    assert laxer_at(BASE, policy("noted", terms=[noted])) is None


def test_faults_end_as_the_strictest_wants_after_the_longest_time() -> None:
    strict = policy("strict", categories=CALM.model_dump(by_alias=True)["categories"])
    patient = KIDS.model_copy(update={"on_error": "review", "timeout_seconds": 90.0})
    for order in ((strict, patient), (patient, strict)):
        both = strictest(order)
        assert (both.identity.count("+"), both.on_error, both.timeout_seconds) == (1, "block", 90.0)
    assert strictest((patient, CALM.model_copy(update={"on_error": "review"}))).on_error == "review"


def test_the_judges_of_all_policies_are_asked() -> None:
    first, second = (
        policy(name, judge={"format": "yes-no", "model": f"/models/{name}"})
        for name in ("one", "two")
    )
    assert strictest((BASE, first)).judges == first.judges != ()
    assert strictest((first, second)).judges == first.judges + second.judges
