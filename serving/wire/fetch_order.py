"""fetch.json: what one `calotype fetch` shall do. The operator writes it, the Job reads it.

Fields that this version does not know are kept and have no effect; an order of a higher version is
refused (`wire.document`).
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Literal

from pydantic import Field, ValidationError

from calotype.serving.config import ImageModel, ModelSource, Name, Source, describe
from calotype.serving.wire.document import Document, ModelManifest, Part
from calotype.serving.wire.fetch_faults import Fault, failed


class LicenceAnswer(Part):
    """What the manifest says of the licence of the weights."""

    name: str | None = None
    accepted: bool = False


class FetchOrder(Document):
    """The content of fetch.json."""

    kind: Literal["adapter", "model"]
    name: Name
    namespace: Name = "default"
    source: ModelSource | Source
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    cache_dir: pathlib.Path | None = Field(
        None, description="Root of the caches; CALOTYPE_DATA_DIR/cache if missing."
    )
    max_bytes: int | None = Field(None, ge=1, description="Largest size of all files together.")
    adapter_type: Literal["lora", "control"] = Field("lora", description="Of an adapter.")
    max_rank: int | None = Field(None, ge=1, description="Highest rank of an adapter.")
    model: ModelManifest | None = Field(
        None, description="Manifest of the ImageModel that an adapter is checked against."
    )
    volume_dir: pathlib.Path | None = Field(
        None, description="What a persistentVolumeClaim or path source must lie in."
    )
    licence: LicenceAnswer | None = Field(
        None, description="Compared with the repository's own where it is given."
    )

    @property
    def folder(self) -> pathlib.Path:
        """Where the revisions of this adapter or model lie."""
        data_dir = pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR") or "calotype-data")
        root = self.cache_dir or data_dir / "cache"
        return (root / f"{self.kind}s" / self.namespace / self.name).absolute()

    @property
    def source_type(self) -> str:
        """Which field of the source is given, for example ``huggingFace``."""
        return next(iter(self.source.model_dump(by_alias=True, exclude_none=True)))

    def base_model(self) -> ImageModel:
        """The model that an adapter belongs to.

        Raises:
            FetchFailed: none is given.
        """
        if self.model is None:
            raise failed(
                Fault.ORDER_INVALID,
                "The order has no model: an adapter is checked against the model it belongs to.",
            )
        return self.model


def read_order(path: pathlib.Path, kind: str) -> FetchOrder:
    """Reads fetch.json.

    Raises:
        FetchFailed: it is missing, no JSON, of another kind, or says what no order may say.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
        order = FetchOrder.model_validate(content)
    except OSError as error:
        raise failed(Fault.ORDER_INVALID, f"{path} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        raise failed(Fault.ORDER_INVALID, f"{path}: {describe(error)}") from None
    except ValueError as error:
        raise failed(Fault.ORDER_INVALID, f"{path} is not valid JSON: {error}.") from None
    if order.kind != kind:
        raise failed(
            Fault.ORDER_INVALID, f"{path} orders the fetch of a {order.kind}, not of a {kind}."
        )
    return order
