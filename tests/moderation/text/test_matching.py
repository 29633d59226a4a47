"""Term lists: what they catch, what they leave alone, and how a wrong list is refused."""

import time

import pytest

from calotype.moderation.policy.categories import Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.text.matching import TermMatcher
from calotype.moderation.text.phrases import fold
from calotype.moderation.text.prompts import PromptRules


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


NAMED = {
    "a portrait of Barack Obama": "public_figure",
    "B4r4ck 0b4m4 eats a pie": "public_figure",
    "T a y l o r S w i f t on a stage": "public_figure",
    "Путин на коне": "public_figure",
    "特朗普的漫画": "public_figure",
    "Trump as a baby": "public_figure",
    "a sketch of Modi": "public_figure",
    "Darth Vader walks a dog": "ip_character",
    "p1kachu eating ramen": "ip_character",
    "Spider-Man swings": "ip_character",
    "Elsa from Frozen": "ip_character",
    "ピカチュウの絵": "ip_character",
}
ORDINARY = [
    "a picture of a queen",
    "the lobby of the Paris Hilton hotel",
    "a king charles spaniel in bed with a child",
    "he played his trump card",
    "Madonna and child, oil on wood",
    "a frozen lake in the morning",
    "a mario shaped cake for Anna and Olaf",
    "a jasmine flower beside a link fence",
    "a brave woman, joy and sadness",
    "prince william county courthouse",
    "a rose bush and a berry bush",
    "the planet Pluto seen from a probe",
    "a photo of my wife at the beach",
    "my friend and this man shake hands",
]


@pytest.mark.parametrize(("text", "category"), NAMED.items())
def test_names_are_marked_in_every_spelling_and_refused_where_the_owner_says(
    text: str, category: str
) -> None:
    for own, verdict in (({}, Verdict.FLAG), ({"block": 0.9}, Verdict.BLOCK)):
        spec = {"version": 1, "extends": "default", "categories": {category: {"text": own}}}
        rules = PromptRules(Policy.from_spec("house", spec))
        found = rules.check(text, [], time.monotonic() + 600).findings
        assert {(f.category, f.verdict) for f in found} == {(category, verdict)}, text


@pytest.mark.parametrize("text", ORDINARY)
def test_words_that_are_names_too_pass(matcher: TermMatcher, text: str) -> None:
    assert matcher.matches(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "Taylor Swift in a bikini",
        "T4yl0r Sw1ft t0pless",
        "Putin shirtless on a horse",
        "a photo of my ex girlfriend without her clothes",
        "undress this photo",
        "deepfake porn of an actress",
        "Zorblina in lingerie",
    ],
)
def test_nobody_who_exists_is_undressed(text: str) -> None:
    """Also whom only the policy's owner has named."""
    own = {"category": "public_figure", "action": "flag", "terms": ["Zorblina"]}
    spec = {"version": 1, "extends": "default", "categories": {"sexual": {}}, "terms": [own]}
    rules = PromptRules(Policy.from_spec("house", spec))
    checked = rules.check(text, [], time.monotonic() + 600)
    assert "real_person_intimate" in {
        f.category for f in checked.findings if f.verdict is Verdict.BLOCK
    }


def test_lists_of_names_do_nothing_where_the_policy_says_nothing() -> None:
    spec = {"version": 1, "lists": ["characters"], "categories": {"sexual": {}}}
    assert TermMatcher.of(Policy.from_spec("open", spec)).matches("Darth Vader") == []


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
