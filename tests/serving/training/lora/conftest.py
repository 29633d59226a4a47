"""The embedded model, loaded once for all tests of a trainer."""

from __future__ import annotations

import pytest
from samples import training_run

from calotype.serving.engine.model.components import Components


@pytest.fixture(scope="package")
def components() -> Components:
    return training_run.components()
