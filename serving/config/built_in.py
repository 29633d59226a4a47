"""What is served where no manifest says otherwise."""

from __future__ import annotations

import pathlib

from calotype.serving.config.base import Metadata, ModelRef
from calotype.serving.config.files import Manifests
from calotype.serving.config.lora_adapter import LoRAAdapter, LoRAAdapterSpec, Scale
from calotype.serving.config.model.image_model import ImageModel, ImageModelSpec
from calotype.serving.config.model.sampling import Defaults, Enlarge, Preset
from calotype.serving.config.sources import BuiltInSource, ModelSource, Source

BUILT_IN_MODEL = ImageModel(
    metadata=Metadata(name="shapes"),
    spec=ImageModelSpec(
        source=ModelSource(built_in=BuiltInSource(name="shapes")),
        precision="float32",
        defaults=Defaults(steps=20, guidance_scale=3.0, size="128x128"),
        quality_presets={
            "low": Preset(steps=10),
            "medium": Preset(steps=20),
            "high": Preset(steps=30),
        },
        enlarge=Enlarge(),
        aliases=[
            "dall-e-2",
            "dall-e-3",
            "gpt-image-1",
            "gpt-image-1-mini",
            "gpt-image-1.5",
            "gpt-image-2",
        ],
    ),
)
"""What `calotype serve` serves when no manifest names a model."""

BUILT_IN_ADAPTER = LoRAAdapter(
    metadata=Metadata(name="stripes"),
    spec=LoRAAdapterSpec(
        model_ref=ModelRef(name="shapes"),
        source=Source(built_in=BuiltInSource(name="stripes")),
        trigger_words=["striped"],
    ),
)
"""The example adapter, served beside the built-in model."""

BUILT_IN_CONTROL = LoRAAdapter(
    metadata=Metadata(name="layout"),
    spec=LoRAAdapterSpec(
        model_ref=ModelRef(name="shapes"),
        type="control",
        source=Source(built_in=BuiltInSource(name="layout")),
        scale=Scale(max=2.0),
    ),
)
"""Its control adapter, which follows edges, depth, segmentation and points."""


BUILT_IN_ADAPTERS = (BUILT_IN_ADAPTER, BUILT_IN_CONTROL)


def with_defaults(found: Manifests) -> Manifests:
    """What was found; without any model the built-in one, with its example adapters."""
    if found.models:
        return found
    return found.model_copy(
        update={"models": [BUILT_IN_MODEL], "adapters": [*found.adapters, *BUILT_IN_ADAPTERS]}
    )


def local_model(name: str) -> ImageModel:
    """The model that a command line names: the built-in one, or a folder of FLUX.2 weights."""
    if name == BUILT_IN_MODEL.name:
        return BUILT_IN_MODEL
    folder = pathlib.Path(name).expanduser().resolve()
    spec = ImageModelSpec(source=ModelSource(path=str(folder)))
    return ImageModel(metadata=Metadata(name="local"), spec=spec)
