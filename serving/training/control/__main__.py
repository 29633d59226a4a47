"""python -m calotype.serving.training.control: makes and scores the control branch "outline".

``train`` runs on one thread and goes on where it was when it is run again. ``evaluate`` draws
held-out maps through the engine and prints what the exact classifier finds in the pictures.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from calotype.serving.training.shapes import MODELS, PACKAGED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calotype.serving.training.control", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the branch; run again to resume")
    train.add_argument("--model", type=pathlib.Path, default=PACKAGED)
    train.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/control"))
    train.add_argument("--out", type=pathlib.Path, default=MODELS / "layout.safetensors")
    train.add_argument("--minutes", type=float, default=20, help="of CPU time")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--pictures", type=int, default=5000)
    train.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    import torch

    from calotype.serving.training.control.branch import train as train_branch

    torch.set_num_threads(arguments.threads)
    train_branch(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
