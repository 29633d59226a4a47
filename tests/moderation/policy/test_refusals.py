"""Sentences for people who are refused something: every language has every one of them."""

from __future__ import annotations

import pytest

from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.refusals import (
    languages,
    preferred_language,
    refusal_message,
    sentences,
)


def test_every_language_has_every_sentence() -> None:
    assert set(languages()) == {"en", "de", "fr", "es", "pt", "it", "ja", "zh"}
    for name, by_language in sentences().items():
        assert tuple(by_language) == languages(), name
        assert len(set(by_language.values())) == len(languages()), f"{name}: one is not translated"
        assert name in {"any", "held"} or name in set(Category)


def test_the_policies_of_the_package_say_the_same_in_english() -> None:
    for name in ("default", "floor"):
        for category, sentence in Policy.packaged(name).messages.items():
            assert sentences()[category.value]["en"] == sentence


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("de", "de"),
        ("de-AT,de;q=0.9,en;q=0.8", "de"),
        ("en;q=0.3, fr;q=0.8", "fr"),
        ("ZH-Hant-TW", "zh"),
        ("sv, da;q=0.9", "en"),
        ("sv, pt-BR;q=0.1", "pt"),
        ("*", "en"),
        ("ja;q=0, it", "it"),
        ("es;q=much, fr;q=nan, it;q=0.2", "it"),
        (",;,;;q=1," * 1000, "en"),
        ("d\x00e, \udc80", "en"),
    ],
)
def test_the_language_follows_the_header(header: str, language: str) -> None:
    assert preferred_language(header) == language


def test_the_gravest_category_is_named_and_the_owners_words_are_kept() -> None:
    assert refusal_message(["sexual", "sexual/minors"]) == sentences()["sexual/minors"]["en"]
    assert refusal_message(["hate/threatening"], language="de") == sentences()["hate"]["de"]
    assert refusal_message(["political"], language="fr") == sentences()["any"]["fr"]
    assert refusal_message(["sexual"], "Ask the studio's desk.", "de") == "Ask the studio's desk."
    packaged = Policy.default().messages[Category.SEXUAL]
    assert refusal_message(["sexual"], packaged, "es") == sentences()["sexual"]["es"]
