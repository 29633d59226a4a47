"""One embedded moderator for all tests: loading the networks takes longer than checking."""

import pytest

from calotype.moderation.moderator import Moderator


@pytest.fixture(scope="session")
def moderator() -> Moderator:
    return Moderator.load()
