"""Which marks the images of this process get.

CALOTYPE_MARKS            ``xmp``, ``watermark``, ``c2pa``, separated by commas, or ``none``; all
                          three if missing, Content Credentials as far as their library is there
CALOTYPE_PROVENANCE_DIR   folder of the keys; ``provenance`` in the data folder if missing
CALOTYPE_MARKS_SECRET     where there is no such folder: the secret that the keys follow from, so
                          that all pods of a cluster mark alike; it follows from
                          CALOTYPE_INTERNAL_TOKEN if missing
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.provenance import watermark
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.moderation.provenance.marks import LAYERS, Layer, Marks
from calotype.serving.config.environment import DATA_DIR, INTERNAL_TOKEN
from calotype.serving.core.derived_secrets import marks_secret
from calotype.serving.core.errors import InvalidRequest

MARKS = "CALOTYPE_MARKS"
PROVENANCE_DIR = "CALOTYPE_PROVENANCE_DIR"
MARKS_SECRET = "CALOTYPE_MARKS_SECRET"


@functools.lru_cache(maxsize=1)
def installation_marks() -> Marks:
    """The marks that the environment asks for; read once per process.

    Raises:
        InvalidRequest: CALOTYPE_MARKS names a layer that does not exist.
        ProvenanceError: the keys cannot be made or read.
    """
    layers = chosen_layers(os.environ)
    keys = installation_keys(os.environ) if set(layers) - {"xmp"} else None
    return Marks(keys, layers, required=MARKS in os.environ)


def installation_keys(
    variables: Mapping[str, str], *, make: bool = True
) -> InstallationKeys | None:
    """The keys that the environment names; None if there are none yet and none shall be made.

    Raises:
        ProvenanceError: they cannot be made or read.
    """
    folder = variables.get(PROVENANCE_DIR)
    token = variables.get(INTERNAL_TOKEN, "").strip()
    secret = variables.get(MARKS_SECRET, "").strip() or (marks_secret(token) if token else "")
    if folder:
        return InstallationKeys.in_folder(pathlib.Path(folder), make=make)
    own = pathlib.Path(variables.get(DATA_DIR) or "calotype-data") / "provenance"
    if secret:
        return InstallationKeys.derived(secret.encode(), own)
    return InstallationKeys.in_folder(own, make=make)


def payload_fingerprint(pixels: NDArray[np.uint8]) -> str:
    """The payload that the watermark of these very pixels has; empty where no key was made yet.

    Raises:
        ProvenanceError: the key cannot be read.
    """
    keys = installation_keys(os.environ, make=False)
    return watermark.payload_of(pixels, keys.watermark).hex() if keys is not None else ""


def chosen_layers(variables: Mapping[str, str]) -> tuple[Layer, ...]:
    """The layers of CALOTYPE_MARKS, in the order of `LAYERS`. Raises InvalidRequest."""
    text = variables.get(MARKS, ",".join(LAYERS)).strip()
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LAYERS:
            raise InvalidRequest(
                f"{MARKS} names {name!r}; write some of {', '.join(LAYERS)}, separated by commas, "
                "or none."
            )
    return tuple(layer for layer in LAYERS if layer in names)
