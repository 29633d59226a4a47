"""Lists as OpenAI's clients page through them."""

from __future__ import annotations

import pytest

from calotype.serving.api.http.pages import Listed, list_object, page_size
from calotype.serving.core.errors import InvalidRequest


def test_a_page_names_its_first_and_its_last_object() -> None:
    items: list[Listed] = [{"id": name} for name in ("a", "b", "c")]
    page = list_object(items, has_more=True)
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("a", "c", True)
    none = list_object(items[:0], has_more=False)
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)


@pytest.mark.parametrize("limit", ["1", "100"])
def test_a_limit_is_a_number_of_objects(limit: str) -> None:
    assert page_size(limit) == int(limit)


@pytest.mark.parametrize("limit", ["0", "101", "-1", "", "ten", "\u0661", "1" * 30])
def test_another_limit_is_refused(limit: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 100"):
        page_size(limit)
