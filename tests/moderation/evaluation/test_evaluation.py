"""`calotype moderation evaluate`: the numbers of a tiny data set, and the words for a wrong one."""

import json
import pathlib

import pytest

from calotype.moderation.errors import EvaluationError
from calotype.moderation.evaluation.evaluation import bootstrap_interval, evaluate
from calotype.moderation.evaluation.evasions import FAMILIES
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedTextClassifier, RaisingClassifier

ROWS = """text,label,note
a violet field,benign,false block
a green field,benign,
a blue field,benign,
"two fields, one lake",benign,
violet one,bouba,a label that no policy knows
violet two,bouba,
green three,bouba,
"""


@pytest.fixture
def dataset(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "set.csv"
    path.write_text(ROWS)
    return path


def moderator() -> Moderator:
    classifier = FixedTextClassifier({"sexual": 0.9}, containing="violet")
    return Moderator(Policy.default(), text_classifiers=[classifier], image_classifiers=[])


def test_every_label_is_reported(dataset: pathlib.Path) -> None:
    report = evaluate(dataset, moderator())
    benign, bouba = report.labels
    assert (benign.label, benign.n, benign.blocked, benign.rate) == ("benign", 4, 1, 0.25)
    assert (bouba.label, bouba.n, bouba.blocked, bouba.flagged) == ("bouba", 3, 2, 0)
    assert bouba.low <= bouba.rate <= bouba.high
    assert report.policy == "default@1"


def test_json_and_lines_say_the_same(dataset: pathlib.Path) -> None:
    report = evaluate(dataset, moderator())
    document = json.loads(json.dumps(report.to_json()))
    assert document["n"] == 7
    assert document["labels"]["benign"]["measure"] == "false_blocks"
    assert document["labels"]["bouba"]["measure"] == "recall"
    assert document["labels"]["bouba"]["rate"] == pytest.approx(2 / 3, abs=1e-6)
    lines = report.lines()
    assert any("benign" in line and "25.0%" in line and "false blocks" in line for line in lines)
    assert any("bouba" in line and "66.7%" in line for line in lines)


def test_the_same_data_gives_the_same_interval(dataset: pathlib.Path) -> None:
    assert evaluate(dataset, moderator()).to_json() == evaluate(dataset, moderator()).to_json()
    hits = [True] * 90 + [False] * 10
    low, high = bootstrap_interval(hits, 0)
    assert 0.82 < low < 0.9 < high < 0.97


def test_failures_count_as_blocked_and_are_told(dataset: pathlib.Path) -> None:
    moderator = Moderator(
        Policy.default(), text_classifiers=[RaisingClassifier()], image_classifiers=[]
    )
    report = evaluate(dataset, moderator)
    assert all(label.blocked == label.unavailable == label.n for label in report.labels)
    assert any("could not be checked" in line for line in report.lines())


def test_progress_is_told(dataset: pathlib.Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate(dataset, moderator(), lambda done, total: told.append((done, total)))
    assert told == [(number, 7) for number in range(1, 8)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"prompt,label\na,benign\n", "there is no column 'text'"),
        (b"text\na\n", "there is no column 'label'"),
        (b"", "there is no column 'text'"),
        (b"text,label\n", "no rows"),
        (b"text,label\na cat\n", "line 2 has no text or no label"),
        (b"text,label\n\xff\xfe,benign\n", "is not UTF-8"),
    ],
)
def test_wrong_file_is_one_sentence(tmp_path: pathlib.Path, content: bytes, reason: str) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        evaluate(path, moderator())
    assert str(path) in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"nowhere\.csv: cannot be read"):
        evaluate("nowhere.csv", moderator())


def test_languages_are_reported_apart(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("text,label,language\nviolet,bouba,de\ngreen,bouba,fr\ngreen,benign,fr\n")
    report = evaluate(path, moderator())
    assert [name for name, _ in report.languages] == ["de", "fr"]
    found = report.to_json()["languages"]
    assert found["de"]["bouba"]["rate"] == 1.0 and found["fr"]["bouba"]["rate"] == 0.0
    assert found["fr"]["benign"]["n"] == 1 and "benign" not in found["de"]
    assert "language fr" in report.lines()


def test_a_disguise_counts_what_is_refused_still(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("text,label\nviolet one,bouba\ngreen,bouba\nviolet two,bouba\n")
    report = evaluate(path, moderator(), evasions=True)
    kept = {evasion.family: (evasion.n, evasion.kept) for evasion in report.evasions}
    assert list(kept) == list(FAMILIES)
    assert kept["injection"] == kept["suffix"] == (2, 1.0)
    assert report.to_json()["evasions"]["suffix"]["refused"] == 2
    assert evaluate(path, moderator()).evasions == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_hides_the_words_and_gives_the_same_twice(family: str) -> None:
    plain = "a nude woman and a corpse in the house"
    hidden = FAMILIES[family](plain)
    assert hidden != plain and FAMILIES[family](plain) == hidden
