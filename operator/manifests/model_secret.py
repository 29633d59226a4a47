"""The Secret of a model's pods: the token of this model, and what their marks follow from.

It is all that they hold. The token opens the jobs and pictures of this model at the gateways.
"""

from __future__ import annotations

import base64

from calotype.operator.kube.labels import labels, owner_reference, workload_name
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.settings import OperatorSettings
from calotype.serving.wire.model_token import ModelIdentity, make_model_token, marks_secret

TOKEN, MARKS = "token", "marks-secret"


def model_secret_name(model: str) -> str:
    return f"{workload_name(model)}-access"


def build_model_secret(owner: Object, internal_token: str, settings: OperatorSettings) -> Manifest:
    """The Secret."""
    metadata = owner["metadata"]
    identity = ModelIdentity(metadata["namespace"], metadata["name"])
    data = {
        TOKEN: make_model_token(internal_token, identity),
        MARKS: marks_secret(internal_token),
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": model_secret_name(metadata["name"]),
            "namespace": metadata["namespace"],
            "labels": labels(settings, "model", model=metadata["name"]),
            "ownerReferences": [owner_reference(owner)],
        },
        "type": "Opaque",
        "data": {key: base64.b64encode(text.encode()).decode() for key, text in data.items()},
    }
