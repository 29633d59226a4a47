"""An error-correcting code for a few dozen bits: rate 1/3, memory 6, decoded by Viterbi.

Generators 133, 171, 165 (octal), free distance 15 (Proakis, Digital Communications, table 8.2-2).
The encoder starts in state zero and is driven back to it by six zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MEMORY = 6
RATE = 3
_STATES = 1 << MEMORY
_GENERATORS = (0o133, 0o171, 0o165)

Bits = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]


def coded_length(bits: int) -> int:
    """How many coded bits ``bits`` become."""
    return RATE * (bits + MEMORY)


def encode(bits: Bits) -> Floats:
    """Coded bits as -1 and +1, [coded_length(len(bits))]."""
    register, out = 0, []
    for bit in [*bits.tolist(), *([0] * MEMORY)]:
        window = (bit << MEMORY) | register
        out += [_parity(window & generator) for generator in _GENERATORS]
        register = window >> 1
    return 2.0 * np.array(out, dtype=np.float64) - 1.0


def decode(soft: Floats, bits: int) -> Bits:
    """The most likely ``bits`` bits.

    Args:
        soft: [coded_length(bits)], its sign the guess and its size the certainty of each coded bit.
    """
    steps = soft.reshape(bits + MEMORY, RATE)
    metric = np.full(_STATES, -np.inf)
    metric[0] = 0.0
    choices = np.empty((len(steps), _STATES), dtype=np.uint8)
    # [step, state arrived at, which of its two predecessors]
    gains = (steps @ _OUTPUTS.reshape(-1, RATE).T).reshape(len(steps), _STATES, 2)
    for step, gain in enumerate(gains):
        arriving = metric[_BEFORE] + gain
        choices[step] = arriving[:, 1] > arriving[:, 0]
        metric = arriving.max(axis=1)
    state, found = 0, np.empty(len(steps), dtype=np.uint8)
    for step in range(len(steps) - 1, -1, -1):
        found[step] = state >> (MEMORY - 1)
        state = int(_BEFORE[state, choices[step, state]])
    return found[:bits]


def _parity(value: int) -> int:
    return value.bit_count() & 1


def _trellis() -> tuple[NDArray[np.intp], Floats]:
    """[state, 2] its predecessors, and [state, 2, RATE] what is sent on the way from each."""
    before = np.empty((_STATES, 2), dtype=np.intp)
    outputs = np.empty((_STATES, 2, RATE))
    for state in range(_STATES):
        for lost in (0, 1):
            window = (state << 1) | lost
            before[state, lost] = window & (_STATES - 1)
            outputs[state, lost] = [2 * _parity(window & g) - 1 for g in _GENERATORS]
    return before, outputs


_BEFORE, _OUTPUTS = _trellis()
