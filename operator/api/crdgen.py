"""Writes the custom resource definitions: `python -m calotype.operator.api.crdgen [--check]`.

The files in `crds/` are made from the very classes that read manifests. They are checked in, so
that a change of the API is seen where it is reviewed; a test says when they are out of date.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from pydantic import BaseModel

from calotype.operator.api.moderation_policy import ModerationPolicy, ModerationPolicyStatus
from calotype.operator.api.schema import plain, structural_schema
from calotype.operator.kube.objects import Manifest
from calotype.serving.config import (
    API_VERSION,
    ImageModel,
    ImageModelStatus,
    LoRAAdapter,
    LoRAAdapterStatus,
    LoRATraining,
    LoRATrainingStatus,
    Resource,
    Team,
    TeamStatus,
)
from calotype.serving.config.base import VALIDATIONS, Rule, Transition, validation

FOLDER = pathlib.Path(__file__).with_name("crds")
HEADER = (
    "# Made by `python -m calotype.operator.api.crdgen` from serving/config; not to be edited.\n"
)
GROUP, _, VERSION = API_VERSION.partition("/")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `kubectl get`; a wide one is shown with `-o wide`."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False

    def render(self) -> Manifest:
        found: Manifest = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return found | ({"priority": 1} if self.wide else {})


READY = '.status.conditions[?(@.type=="Ready")]'
REASON = Column("Reason", f"{READY}.reason", wide=True)
AGE = Column("Age", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True, slots=True)
class Kind:
    resource: type[Resource]
    status: type[BaseModel]
    plural: str
    short_names: tuple[str, ...]
    columns: tuple[Column, ...]
    scale: tuple[str, str, str] | None = None
    """Paths of wanted replicas, present replicas and label selector, for `kubectl scale`."""

    @property
    def name(self) -> str:
        return self.resource.__name__


KINDS = (
    Kind(
        ImageModel,
        ImageModelStatus,
        "imagemodels",
        ("im",),
        (
            Column("Phase", ".status.phase"),
            Column("Ready", ".status.serving"),
            Column("Max", ".spec.replicas.max", "integer"),
            Column("Adapters", ".status.adapters.loaded", "integer"),
            Column("Queue", ".status.queueSeconds", "number", wide=True),
            Column("Revision", ".status.resolvedRevision", wide=True),
            Column("URL", ".status.url", wide=True),
            REASON,
            AGE,
        ),
        scale=(".spec.replicas.min", ".status.replicas.ready", ".status.selector"),
    ),
    Kind(
        LoRAAdapter,
        LoRAAdapterStatus,
        "loraadapters",
        ("lora",),
        (
            Column("Model", ".spec.modelRef.name"),
            Column("Phase", ".status.phase"),
            Column("Loaded", ".status.loaded"),
            Column("Revision", ".status.resolvedRevision"),
            REASON,
            AGE,
        ),
    ),
    Kind(
        ModerationPolicy,
        ModerationPolicyStatus,
        "moderationpolicies",
        ("modpol",),
        (
            Column("Version", ".spec.version", "integer"),
            Column("Used-By", ".status.usedBy", "integer"),
            Column("Ready", f"{READY}.status"),
            REASON,
            AGE,
        ),
    ),
    Kind(
        Team,
        TeamStatus,
        "teams",
        ("team",),
        (
            Column("Weight", ".spec.weight", "number"),
            Column("Key", ".status.keySecretRef.name"),
            Column("Images", ".status.usage.images", "integer"),
            Column("Ready", f"{READY}.status"),
            Column("Cost", ".status.usage.cost", "number", wide=True),
            REASON,
            AGE,
        ),
    ),
    Kind(
        LoRATraining,
        LoRATrainingStatus,
        "loratrainings",
        ("loratrain",),
        (
            Column("Model", ".spec.modelRef.name"),
            Column("Phase", ".status.phase"),
            Column("Progress", ".status.progress"),
            Column("Loss", ".status.loss", "number"),
            Column("Adapter", ".status.adapterRef.name", wide=True),
            REASON,
            AGE,
        ),
    ),
)


def build_crd(kind: Kind) -> Manifest:
    """The CustomResourceDefinition of a kind."""
    subresources: Manifest = {"status": {}}
    if kind.scale is not None:
        wanted, present, selector = kind.scale
        subresources["scale"] = {
            "specReplicasPath": wanted,
            "statusReplicasPath": present,
            "labelSelectorPath": selector,
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [name for name in kind.short_names if name != kind.name.lower()],
                "categories": ["calotype"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [column.render() for column in kind.columns],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": _root(kind)},
                }
            ],
        },
    }


def _root(kind: Kind) -> Manifest:
    """The schema of the whole object; metadata is checked by Kubernetes itself."""
    field = kind.resource.model_fields["spec"]
    assert isinstance(field.annotation, type)
    spec = structural_schema(field.annotation)
    rules: list[Rule | Transition] = [*kind.resource.rules, *kind.resource.transitions]
    found: Manifest = {
        "description": " ".join((kind.resource.__doc__ or "").split()),
        "type": "object",
        "properties": {
            "apiVersion": {"description": f"{API_VERSION}.", "type": "string"},
            "kind": {"description": f"{kind.name}.", "type": "string"},
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            "spec": spec,
            "status": structural_schema(kind.status, defaults=False),
        },
    }
    if field.is_required():
        found["required"] = ["spec"]
    else:
        spec["default"] = plain(field.get_default(call_default_factory=True))
    if rules:
        found[VALIDATIONS] = [validation(rule) for rule in rules]
    return found


def render(kind: Kind) -> str:
    """The YAML file of a kind."""
    body = yaml.dump(build_crd(kind), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
    return HEADER + body


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: not every tool that reads CRDs knows YAML's anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def stale(folder: pathlib.Path) -> list[str]:
    """A sentence for each file of the folder that is not what the classes say now."""
    wanted = {f"{kind.plural}.yaml": render(kind) for kind in KINDS}
    present = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.yaml")}
    found = [f"{name} is missing" for name in sorted(wanted.keys() - present.keys())]
    found += [f"{name} belongs to no kind" for name in sorted(present.keys() - wanted.keys())]
    both = sorted(wanted.keys() & present.keys())
    return found + [f"{name} is out of date" for name in both if wanted[name] != present[name]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the files; 1 = some are out of date."""
    parser = argparse.ArgumentParser(
        prog="python -m calotype.operator.api.crdgen", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER, help="folder of the files")
    options = parser.parse_args(arguments)
    if options.check:
        problems = stale(options.output)
        for problem in problems:
            print(f"{options.output}: {problem}; run `{parser.prog}`.", file=sys.stderr)
        return 1 if problems else 0
    options.output.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (options.output / f"{kind.plural}.yaml").write_text(render(kind), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
