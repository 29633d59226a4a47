"""The chart as its user installs it, and what its user does then: kubectl, helm, the API."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from controlplane.client.commands import Answer
from controlplane.client.objects import Object
from controlplane.processes.pod_cluster import PodCluster
from helm.rendering import CHART
from PIL import Image

PROMPT = "a large red circle on a white background"
SECONDS = 900
"""For a model to be Ready on a machine that is busy with others."""


@dataclass(frozen=True)
class Release:
    """The installed chart, and what its user has at hand."""

    cluster: PodCluster
    namespace: str
    url: str
    notes: str

    def kubectl(self, *words: str | Path, check: bool = True, stdin: str = "") -> Answer:
        return self.cluster.kubectl(
            *words, "-n", self.namespace, check=check, stdin=stdin, timeout=SECONDS + 30
        )

    def helm(self, *words: str | Path) -> Answer:
        return self.cluster.helm(*words, "-n", self.namespace, timeout=SECONDS + 30)

    def secret(self, name: str, key: str) -> str:
        data = self.cluster.get("secret", name, self.namespace)["data"]
        return base64.b64decode(data[key]).decode()

    def client(self, key: str | None = None) -> openai.OpenAI:
        mine = key or self.secret("calotype-api-key", "api-key")
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=mine, max_retries=0, timeout=SECONDS
        )

    def draw(
        self, loras: list[Object] | None = None, model: str = "shapes", **more: object
    ) -> bytes:
        """The pixels of the image with seed 7; its file also says which adapters it has."""
        body: Object = {"seed": 7, **({"loras": loras} if loras else {}), **more}
        with self.client() as client:
            answer = client.images.generate(
                model=model, prompt=PROMPT, response_format="b64_json", extra_body=body
            )
        assert answer.data is not None
        file = io.BytesIO(base64.b64decode(str(answer.data[0].b64_json)))
        with Image.open(file) as image:
            assert image.format == "PNG"
            return image.tobytes()

    def models(self, key: str | None = None) -> list[str]:
        """What the gateway offers to a key."""
        with self.client(key) as client:
            return [model.id for model in client.models.list()]

    def pods(self, component: str, model: str = "") -> list[Object]:
        """The pods of a component of the chart, of one model where it is given."""
        selector = f"app.kubernetes.io/instance=calotype,app.kubernetes.io/component={component}"
        selector += f",calotype.dev/model={model}" if model else ""
        return self.cluster.items("pods", self.namespace, selector)

    def named(self, kind: str, part: str) -> list[str]:
        """Names of objects that have ``part`` in them."""
        names = [item["metadata"]["name"] for item in self.cluster.items(kind, self.namespace)]
        return [name for name in names if part in name]

    def wait(self, what: str) -> Answer:
        seconds = f"--timeout={SECONDS}s"
        return self.kubectl("wait", "--for=condition=Ready", what, seconds)


@contextlib.contextmanager
def installed(pod_cluster: PodCluster, *more: str) -> Iterator[Release]:
    """`helm install` with the values of a trial and ``more``, and a way to the gateway."""
    registry, _, tag = pod_cluster.image("calotype-gateway").rpartition(":")
    registry = registry.rpartition("/")[0]
    words = ["-f", str(CHART / "values-trial.yaml"), "--wait", "--timeout", f"{SECONDS}s", *more]
    words += ["--set", f"image.registry={registry}", "--set", f"image.tag={tag}"]
    if pod_cluster.find("crd", "imagemodels.calotype.dev") is not None:  # other tests were here
        words.append("--take-ownership")
    with pod_cluster.namespace() as name:
        notes = pod_cluster.helm("install", "calotype", str(CHART), "-n", name, *words)
        with pod_cluster.forward("svc/calotype-gateway", 80, name) as url:
            yield Release(pod_cluster, name, url, notes)
        pod_cluster.kubectl("delete", "imagemodels,loraadapters", "--all", "-n", name, check=False)
