"""How many GPUs may draw a picture together: as many as a replica of the profile has."""

from __future__ import annotations

from typing import Any

import pytest

from calotype.operator.planning.model_check import check_models
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel

SETTINGS = OperatorSettings.model_validate(
    {
        "release": "r",
        "serveImage": "serve:1",
        "resourceProfiles": {"eight": {"gpus": 8}, "one": {"gpus": 1}, "none": {"gpus": 0}},
    }
)
OWN_ENCODER = {"textEncoder": {"resourceProfile": "one"}}


def refusal(profile: str, devices: int, **spec: Any) -> str:
    """The sentence that refuses the model; empty where it is accepted."""
    model = ImageModel.model_validate(
        {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "ImageModel",
            "metadata": {"name": "m", "namespace": "n"},
            "spec": {
                "source": {"path": "/models/flux"},
                "resourceProfile": profile,
                "acceleration": {"devicesPerPicture": devices},
                **spec,
            },
        }
    )
    refused = check_models({("n", "m"): model}, {}, {}, SETTINGS)
    return refused[("n", "m")].message if refused else ""


@pytest.mark.parametrize(
    ("profile", "devices", "spec"),
    [
        ("eight", 1, {}),
        ("eight", 7, {}),
        ("eight", 8, OWN_ENCODER),
        ("one", 1, {}),
        ("none", 4, {}),
    ],
)
def test_what_a_replica_has_is_accepted(profile: str, devices: int, spec: dict[str, Any]) -> None:
    assert refusal(profile, devices, **spec) == ""


def test_more_than_a_replica_has_is_refused() -> None:
    said = refusal("eight", 8)
    assert "draws on 7 of 8 GPUs, for the text encoder takes one of them" in said
    assert "spec.textEncoder" in said
    said = refusal("eight", 9, **OWN_ENCODER)
    assert "draws on 8 of 8 GPUs: lower it, name a profile with more." in said
    assert "draws on 1 of 1 GPUs" in refusal("one", 2)
