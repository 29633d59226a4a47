"""The chart as helm renders it: one `helm template` for each set of values in a test run."""

from __future__ import annotations

import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import yaml
from controlplane.client.objects import Object

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
RELEASE, NAMESPACE = "acme", "pictures"

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "trial": ("values-trial.yaml",),
    "production": ("values-production.yaml",),
    "a100-p4d": ("values-production.yaml", "values-a100-p4d.yaml"),
    "a100-a2": ("values-production.yaml", "values-a100-a2.yaml"),
    "lambda": ("values-production.yaml", "values-lambda.yaml"),
}
"""Every values file, the ones of clouds on top of the one for production."""

WITH_MODEL: Object = {"defaultModel": {"enabled": True, "spec": {"licence": {"accepted": True}}}}
"""What somebody adds who accepts the licence."""
CLOUDS = ("a100-p4d", "a100-a2", "lambda")
"""The combinations with a default model whose licence has to be accepted."""


class Refused(Exception):
    """helm ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Rendered:
    """Objects of one `helm template`."""

    objects: list[Object]

    def kind(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str, name: str, namespace: str = NAMESPACE) -> Object:
        """
        Raises:
            LookupError: there is not exactly one.
        """
        found = [
            item
            for item in self.kind(kind)
            if item["metadata"]["name"] == name
            and item["metadata"].get("namespace", namespace) == namespace
        ]
        if len(found) != 1:
            names = [item["metadata"]["name"] for item in self.kind(kind)]
            raise LookupError(f"{len(found)} of {kind} {namespace}/{name}; there are {names}")
        return found[0]

    def pods(self) -> Iterator[tuple[str, Object]]:
        """(kind/name of the owner, pod template) of everything that makes pods."""
        for item in self.objects:
            where = f"{item['kind']}/{item['metadata']['name']}"
            if item["kind"] == "Pod":
                yield where, item
            elif item["kind"] in ("Deployment", "Job"):
                yield where, item["spec"]["template"]

    def settings(self) -> Object:
        """The operator's settings."""
        text = self.one("ConfigMap", f"{RELEASE}-operator")["data"]["operator.yaml"]
        return dict(yaml.safe_load(text))


Combinations = Callable[[str], Rendered]
"""The objects of a combination of values files, by its name in `COMBINATIONS`."""


@dataclass(frozen=True)
class Chart:
    """The chart of the repository; `helm` is the program, `scratch` a folder for its files.

    What helm wrote for a set of values is kept. Every call parses it anew, so that a test may
    change the objects that it got.
    """

    helm: pathlib.Path
    scratch: pathlib.Path
    written: dict[tuple[str, ...], str] = field(default_factory=dict)

    def render(
        self,
        *files: str,
        values: Object | None = None,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
    ) -> Rendered:
        """`helm template` with values files of the chart, and some values on top.

        Raises:
            Refused: helm does not render these values.
        """
        key = (*files, json.dumps(values), release, namespace)
        if key not in self.written:
            words = (*self._values(files, values), "-n", namespace)
            self.written[key] = self._run("template", release, *words)
        # The loader in C: the definitions of the kinds alone take the one in Python 0.6 s.
        objects = yaml.load_all(self.written[key], Loader=yaml.CSafeLoader)
        return Rendered([item for item in objects if item])

    def combination(self, name: str, namespace: str = NAMESPACE) -> Rendered:
        """`render` of a combination of values files, with its model where it has one."""
        values = WITH_MODEL if name in CLOUDS else None
        return self.render(*COMBINATIONS[name], values=values, namespace=namespace)

    def refusal(self, *files: str, values: Object) -> str:
        """What helm says of values that it must not take.

        Raises:
            AssertionError: it takes them.
        """
        try:
            self.render(*files, values=values)
        except Refused as refused:
            return str(refused)
        raise AssertionError(f"helm took {json.dumps(values)}")

    def lint(self, *files: str, values: Object | None = None) -> str:
        """
        Raises:
            Refused: helm has something against the chart.
        """
        return self._run("lint", None, *self._values(files, values), "--strict")

    def notes(self, *files: str, values: Object | None = None) -> str:
        """NOTES.txt as somebody without a cluster at hand sees it."""
        dry = self._run(
            "install", RELEASE, *self._values(files, values), "-n", NAMESPACE, "--dry-run=client"
        )
        return dry.partition("\nNOTES:\n")[2]

    def _values(self, files: tuple[str, ...], values: Object | None) -> list[str]:
        arguments = [part for file in files for part in ("-f", str(CHART / file))]
        if values is not None:
            extra = self.scratch / "values.json"
            extra.write_text(json.dumps(values), encoding="utf-8")
            arguments += ["-f", str(extra)]
        return arguments

    def _run(self, command: str, release: str | None, *arguments: str) -> str:
        words = [str(self.helm), command, *([release] if release else []), str(CHART), *arguments]
        folders = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HOME")
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=600,
            env={name: str(self.scratch) for name in folders} | {"KUBECONFIG": "/dev/null"},
        )
        if done.returncode:
            raise Refused(done.stderr + done.stdout)
        return done.stdout
