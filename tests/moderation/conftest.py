"""One embedded moderator for all tests: loading the networks takes longer than checking."""

import pytest

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy


@pytest.fixture(scope="session")
def moderator() -> Moderator:
    """Under the default policy, with a time-out that a busy machine does not reach."""
    return Moderator(Policy.default().model_copy(update={"timeout_seconds": 300.0}))
