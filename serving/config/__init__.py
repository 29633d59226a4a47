"""What a manifest may say.

The custom resources of calotype are its configuration format everywhere: the operator reads them
from the Kubernetes API, ``calotype serve -f`` reads the same files from disk. Nothing here loads a
model, opens a database or talks to Kubernetes.
"""

from calotype.serving.config.base import (
    API_VERSION,
    Metadata,
    ModelRef,
    Name,
    PolicyRef,
    Resource,
    SecretRef,
    Spec,
)
from calotype.serving.config.built_in import (
    BUILT_IN_ADAPTER,
    BUILT_IN_CONTROL,
    BUILT_IN_MODEL,
    local_model,
    with_defaults,
)
from calotype.serving.config.conditions import Condition, Failure, Retried
from calotype.serving.config.files import ManifestError, Manifests, describe, read_manifests
from calotype.serving.config.local import load_manifests
from calotype.serving.config.lora_adapter import (
    LoadState,
    LoRAAdapter,
    LoRAAdapterSpec,
    LoRAAdapterStatus,
    Scale,
)
from calotype.serving.config.lora_training import (
    LoRATraining,
    LoRATrainingSpec,
    LoRATrainingStatus,
)
from calotype.serving.config.model.image_model import (
    AdapterPolicy,
    ImageModel,
    ImageModelSpec,
    ImageModelStatus,
)
from calotype.serving.config.model.sampling import PATCH, Defaults, Enlarge, Limits, Preset
from calotype.serving.config.model.scaling import Autoscaling, Replicas, TextEncoder
from calotype.serving.config.quantity import bytes_of
from calotype.serving.config.sources import (
    CREDENTIAL_KEYS,
    BuiltInSource,
    HttpSource,
    HuggingFaceSource,
    MergedModel,
    MergeSource,
    ModelSource,
    ProviderSource,
    S3Source,
    Source,
    VolumeSource,
    credential_keys,
)
from calotype.serving.config.team import Quotas, Team, TeamSpec, TeamStatus

__all__ = [
    "API_VERSION",
    "BUILT_IN_ADAPTER",
    "BUILT_IN_CONTROL",
    "BUILT_IN_MODEL",
    "CREDENTIAL_KEYS",
    "PATCH",
    "AdapterPolicy",
    "Autoscaling",
    "BuiltInSource",
    "Condition",
    "Defaults",
    "Enlarge",
    "Failure",
    "HttpSource",
    "HuggingFaceSource",
    "ImageModel",
    "ImageModelSpec",
    "ImageModelStatus",
    "Limits",
    "LoRAAdapter",
    "LoRAAdapterSpec",
    "LoRAAdapterStatus",
    "LoRATraining",
    "LoRATrainingSpec",
    "LoRATrainingStatus",
    "LoadState",
    "ManifestError",
    "Manifests",
    "MergeSource",
    "MergedModel",
    "Metadata",
    "ModelRef",
    "ModelSource",
    "Name",
    "PolicyRef",
    "Preset",
    "ProviderSource",
    "Quotas",
    "Replicas",
    "Resource",
    "Retried",
    "S3Source",
    "Scale",
    "SecretRef",
    "Source",
    "Spec",
    "Team",
    "TeamSpec",
    "TeamStatus",
    "TextEncoder",
    "VolumeSource",
    "bytes_of",
    "credential_keys",
    "describe",
    "load_manifests",
    "local_model",
    "read_manifests",
    "with_defaults",
]
