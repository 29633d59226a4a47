"""The error tree travels: between processes, and through a job row."""

from __future__ import annotations

import json
import pickle

import pytest

from calotype.serving.api.http.failures import BY_CLASS, error_object, wire
from calotype.serving.core.errors import (
    CalotypeError,
    ContentBlocked,
    InvalidRequest,
    NotFound,
    all_error_classes,
    error_from_payload,
)

CLASSES = all_error_classes()


def example(cls: type[CalotypeError]) -> CalotypeError:
    return cls("What is wrong.", "some_code", "loras[0].id", 3.5, {"stage": "input"})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_survives_pickling(cls: type[CalotypeError]) -> None:
    error = pickle.loads(pickle.dumps(example(cls)))
    assert type(error) is cls
    assert error.to_payload() == example(cls).to_payload()
    assert str(error) == "What is wrong."


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_survives_the_store(cls: type[CalotypeError]) -> None:
    error = error_from_payload(json.loads(json.dumps(example(cls).to_payload())))
    assert type(error) is cls
    assert error.to_payload() == example(cls).to_payload()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_a_status_and_a_default_code(cls: type[CalotypeError]) -> None:
    error = cls("What is wrong.")
    assert error.code == cls.default_code
    status, kind, _ = wire(error)
    assert 400 <= status < 600 and kind
    assert set(error_object(error)) >= {"message", "type", "param", "code"}


def test_the_docstring_draws_the_whole_tree() -> None:
    import calotype.serving.core.errors as module

    for cls in CLASSES:
        if cls.__module__ == module.__name__:
            assert cls.__name__ in (module.__doc__ or ""), cls.__name__


def test_an_unknown_class_in_a_row_becomes_the_root() -> None:
    assert type(error_from_payload({"class": "Future", "message": "m"})) is CalotypeError
    assert str(error_from_payload({})) == "The request failed."


def test_a_more_special_class_keeps_its_own_line_of_the_table() -> None:
    assert wire(InvalidRequest("m")).status == 400
    assert wire(NotFound("m")).status == 404
    assert wire(ContentBlocked("m")).type == "image_generation_user_error"
    assert CalotypeError in BY_CLASS


def test_details_never_replace_what_every_error_has() -> None:
    error = InvalidRequest("m", details={"message": "other", "reason": "r", "private": 1})
    assert error_object(error)["message"] == "m"
    assert error_object(error)["reason"] == "r"
    assert "private" not in error_object(error)
