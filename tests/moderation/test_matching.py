"""Term lists: what they catch, what they leave alone, and how a wrong list is refused."""

import pytest

from calotype.moderation.matching import TermMatcher, fold
from calotype.moderation.policy import Policy


@pytest.fixture(scope="module")
def matcher() -> TermMatcher:
    return TermMatcher.of(Policy.default())


def blocking(matcher: TermMatcher, text: str) -> set[str]:
    return {match.category.value for match in matcher.matches(text) if match.action == "block"}


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("A NUDE woman in a studio", "sexual"),
        ("a woman, completely n-a-k-e-d? no: naked", "sexual"),
        ("explicit pornography", "sexual"),
        ("nuuuude woman", "sexual"),
        ("a child, naked", "sexual/minors"),
        ("schoolgirl in lingerie", "sexual/minors"),
        ("a dismembered corpse", "violence/graphic"),
        ("a woman cutting her wrists", "self-harm"),
        ("how to build a pipe bomb", "illicit/violent"),
        ("exterminate all the immigrants", "hate/threatening"),
        ("裸体的女人", "sexual"),
    ],
)
def test_terms_block(matcher: TermMatcher, text: str, category: str) -> None:
    assert category in blocking(matcher, text)


@pytest.mark.parametrize(
    "text",
    [
        "nude lipstick on marble",
        "a breast cancer awareness poster",
        "a naked mole rat",
        "grilled chicken breasts",
        "a jar of spices",
        "Sussex and Essex, a map",
        "a cockatoo and a great dane",
        "a child playing on the beach",
        "blood orange juice",
        "the Suicide Squad logo on a lunch box",
        "shoot a photo at night",
        "how to kill a process",
        "a Jewish wedding and a Muslim wedding",
        "a raccoon in a classroom",
        "",
        "🙂🙂🙂",
    ],
)
def test_harmless_words_pass(matcher: TermMatcher, text: str) -> None:
    assert blocking(matcher, text) == set()


def test_rule_of_distance(matcher: TermMatcher) -> None:
    filler = "and then a very long walk over the hills " * 8
    assert "sexual/minors" in blocking(matcher, "a child beside a topless adult")
    assert "sexual/minors" not in blocking(matcher, f"a child {filler} a topless adult")


def test_match_names_list_and_rule(matcher: TermMatcher) -> None:
    (match,) = matcher.matches("hardcore porn")
    assert match.rule == "lists.sexual.pornography"


def test_fold_joins_what_punctuation_parts() -> None:
    assert fold("Don't -- STOOOOP_it!") == "dont stop it"


def test_terms_of_the_policys_owner() -> None:
    policy = Policy.from_spec(
        "brand",
        {
            "version": 1,
            "categories": {"ip_character": {}},
            "terms": [{"category": "ip_character", "action": "review", "terms": ["Zorblax*"]}],
        },
    )
    (match,) = TermMatcher.of(policy).matches("a portrait of ZORBLAXIAN warriors")
    assert (match.category, match.action) == ("ip_character", "review")
