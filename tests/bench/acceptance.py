"""python tests/bench/acceptance.py: how often the gate lets good adapters pass, and bad ones not.

Trains adapters of shapes that the embedded model has never seen, by `calotype train lora`: good
ones and two kinds of bad ones; random and wrong-concept ones are made of the good. Every one goes
through its whole acceptance set, drawn by the engine that serves. A run that is stopped goes on
where it was; with 20 of each it takes hours on two cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.samples import concepts  # noqa: E402

from calotype.moderation.moderator import Moderator  # noqa: E402
from calotype.serving.acceptance.gate import (  # noqa: E402
    CANDIDATE,
    Candidate,
    TrainingPicture,
    accept,
    file_sha256,
)
from calotype.serving.acceptance.studio import LocalStudio  # noqa: E402
from calotype.serving.config import BUILT_IN_MODEL  # noqa: E402
from calotype.serving.config.model.acceptance import Acceptance  # noqa: E402
from calotype.serving.core.request import AdapterRef  # noqa: E402
from calotype.serving.deployments.local import LocalPipeline  # noqa: E402

KINDS = ("good", "random", "overfit", "wrong concept", "copied")
TRAINED: dict[str, tuple[str, ...]] = {
    "good": ("--class-word", "circle", "--class-word", "square", "--class-word", "star",
             "--preset", "quality"),
    "overfit": ("--style", "--rank", "16", "--steps", "250", "--learning-rate", "0.005"),
    "copied": ("--style", "--rank", "16", "--steps", "250", "--learning-rate", "0.004"),
}  # fmt: skip
"""Options of `calotype train lora`. The bad ones learn from five pictures without preservation; a
copying one has no other words for them than the trigger."""
FEW = 5


def cases(each: int) -> list[tuple[str, int]]:
    """(concept, seed)"""
    names = list(concepts.OUTLINES)
    return [(names[i % len(names)], i // len(names)) for i in range(each)]


def make(work: pathlib.Path, kind: str, concept: str, seed: int) -> pathlib.Path:
    """The adapter's file; trained or made where it is missing."""
    name = f"{concept}-{seed}"
    file = work / kind.replace(" ", "-") / f"{name}.safetensors"
    if file.exists():
        return file
    if kind == "wrong concept":
        names = list(concepts.OUTLINES)
        return make(work, "good", names[(names.index(concept) + 1) % len(names)], seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        factors = {
            key: torch.randn(value.shape, generator=generator) * value.float().std()
            for key, value in load_file(make(work, "good", concept, seed)).items()
        }
        save_file(factors, file)
        return file
    data = work / "data" / f"{kind}-{name}"
    concepts.write_data_set(data, concept, 20 if kind == "good" else FEW, seed)
    if kind == "copied":
        for text in data.glob("*.txt"):
            text.write_text(concepts.TRIGGER)
    command = [sys.executable, "-m", "calotype.serving", "train", "lora", str(data)]
    command += ["--trigger", concepts.TRIGGER, "--rights", "own", "--holdout", "0"]
    command += ["--seed", str(seed), "--threads", "1", "-o", str(file), *TRAINED[kind]]
    # Flat shapes have few details: pictures that differ have nearly the same hash.
    subprocess.run([*command, "--duplicates-within", "0"], check=True, stderr=subprocess.DEVNULL)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=20, help="adapters of each kind")
    parser.add_argument("--pictures", type=int, default=24, help="of each kind of prompt")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/acceptance"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = LocalPipeline(BUILT_IN_MODEL, {}, Moderator.load(), 1)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for concept, seed in cases(arguments.each):
        for kind in KINDS:
            kept = arguments.work / "reports" / f"{kind}-{concept}-{seed}.json"
            if not kept.exists():
                file = make(arguments.work, kind, concept, seed)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(measured(pipeline, file, concept, seed, arguments.pictures))
            report = json.loads(kept.read_text())
            outcomes[kind][report["outcome"]] += 1
            failed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
            print(f"{kind:<14} {concept}-{seed:<4} {report['outcome']:<9} {' '.join(failed)}")
    for kind, counts in outcomes.items():
        print(f"{kind:<14} promoted {counts['promoted']} of {counts.total()}")


def measured(
    pipeline: LocalPipeline, file: pathlib.Path, concept: str, seed: int, pictures: int
) -> str:
    data = concepts.data_set(concept, 20, seed)
    pipeline.load_adapter(CANDIDATE, file)
    begun = time.process_time()
    accepted = accept(
        LocalStudio(BUILT_IN_MODEL, pipeline, AdapterRef(CANDIDATE)),
        Candidate(
            f"{concept}-{seed}",
            file_sha256(file),
            concepts.TRIGGER,
            tuple(TrainingPicture(f"{i:02}.png", pixels) for i, (pixels, _) in enumerate(data)),
        ),
        BUILT_IN_MODEL,
        Acceptance(pictures=pictures),
    )
    print(f"measured in {time.process_time() - begun:.0f} s of CPU", file=sys.stderr)
    return accepted.report.to_json()


if __name__ == "__main__":
    main()
