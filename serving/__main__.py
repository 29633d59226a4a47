"""`calotype`, also as ``python -m calotype.serving``.

In a container it is process 1, for which Linux drops every signal that has no handler. Without one
from the first moment, a pod that is deleted while Python still imports stays for all its grace
period.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end)
    from calotype.serving.commands.cli import main as run

    run()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
