"""python -m calotype.serving.training.control: makes and scores the control branch "layout".

``train`` runs on one thread and goes on where it was when it is run again. ``evaluate`` draws
held-out maps through the engine and prints what the exact classifier finds in the pictures.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from calotype.serving.training.shapes import MODELS, PACKAGED

BRANCH = MODELS / "layout.safetensors"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calotype.serving.training.control", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the branch; run again to resume")
    train.add_argument("--model", type=pathlib.Path, default=PACKAGED)
    train.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/control"))
    train.add_argument("--out", type=pathlib.Path, default=BRANCH)
    train.add_argument("--minutes", type=float, default=20, help="of CPU time")
    train.add_argument("--anywhere", type=float, default=0.0, help="share of maps off the grid")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--pictures", type=int, default=5000)
    check = commands.add_parser("evaluate", help="score held-out maps")
    check.add_argument("--model", type=pathlib.Path, default=PACKAGED)
    check.add_argument("--branch", type=pathlib.Path, default=BRANCH)
    check.add_argument("--maps", type=int, default=200)
    check.add_argument("--anywhere", type=float, default=0.0, help="share of maps off the grid")
    check.add_argument("--scale", type=float, default=1.0, help="0 draws without the maps")
    check.add_argument("--end", type=float, default=1.0, help="share of the steps")
    check.add_argument("--steps", type=int, default=20)
    check.add_argument("--seed", type=int, default=4242)
    check.add_argument("--json", action="store_true", help="print the scores as JSON")
    check.add_argument("--sheet", type=pathlib.Path, help="save the first 32 as one PNG")
    for command in (train, check):
        command.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.command == "train":
        from calotype.serving.training.control.branch import train as train_branch

        train_branch(arguments)
    else:
        from calotype.serving.training.control.evaluation import evaluate

        evaluate(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
