"""What a model app and the gateways know each other by: a token for each model.

It follows from the internal token of the release, which no pod of a model has, so that a pod that
is taken opens its own model and no other. As text: ``model.NAMESPACE.NAME.DIGEST``.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from calotype.serving.core.derived_secrets import derived_secret
from calotype.serving.core.derived_secrets import marks_secret as marks_secret

_KIND = "model"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """An ImageModel."""

    namespace: str
    name: str


def make_model_token(internal_token: str, model: ModelIdentity) -> str:
    """The token of one model."""
    claim = f"{_KIND}.{model.namespace}.{model.name}"
    return f"{claim}.{derived_secret(internal_token, claim)}"


def read_model_token(internal_token: str, token: str) -> ModelIdentity | None:
    """Whose token it is; None = nobody's. Names of models and namespaces have no dots."""
    parts = token.split(".")
    if len(parts) != 4 or parts[0] != _KIND:
        return None
    model = ModelIdentity(parts[1], parts[2])
    wanted = make_model_token(internal_token, model)
    given = token.encode("utf-8", "replace")
    return model if hmac.compare_digest(given, wanted.encode()) else None
