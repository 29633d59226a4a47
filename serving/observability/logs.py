"""What the log looks like: one JSON object a line where machines read it, and never a secret.

``CALOTYPE_LOG_FORMAT`` is ``json`` or ``text``; every line of a request carries its trace ID.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import sys
from collections import OrderedDict
from typing import Literal

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.observability.tracing import trace_id

VARIABLE = "CALOTYPE_LOG_FORMAT"
HIDDEN = "[hidden]"
REPEATED_SECONDS = 60.0
_REMEMBERED = 1000
_SECRETS = re.compile(
    r"(?P<before>ct_live_|whsec_|hf_(?=[A-Za-z0-9]{20})|Bearer\s+|Basic\s+|(?i:signature)=)"
    r"[A-Za-z0-9._~+/=-]{4,}|(?P<user>://[^\s/:@]*:)[^\s/@]+(?=@)"
)


def without_secrets(text: str) -> str:
    """``text`` with API keys, webhook secrets, tokens, signatures and passwords blotted out."""
    return _SECRETS.sub(lambda found: f"{found['before'] or found['user']}{HIDDEN}", text)


class TextFormatter(logging.Formatter):
    """As the standard one, without secrets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message", "trace_id", "exception"}``; the last two if any."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
        }
        current = trace_id()
        if current is not None:
            line["trace_id"] = current
        if record.exc_info:
            line["exception"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


class Repeats(logging.Filter):
    """Writes a warning that comes again and again once a minute, with how often it came.

    What waits for something that is away looks for it every half second; the log shall say that it
    is away, not each look.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """Logger and message -> when it was written last, and how often it came since."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info:
            return True
        message = record.getMessage()
        at, since = self._written.pop((record.name, message), (-math.inf, 0))
        again = record.created - at < REPEATED_SECONDS
        self._written[record.name, message] = (at, since + 1) if again else (record.created, 0)
        if len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)
        if again:
            return False
        if since:
            record.msg, record.args = f"{message} ({since} times more since the last line)", ()
        return True


def set_up_logs(default: Literal["json", "text"] = "text", level: int = logging.INFO) -> None:
    """Gives the root logger one handler, to the standard error; a second call replaces it.

    Args:
        level: the least that is written, unless somebody has chosen before.

    Raises:
        InvalidRequest: CALOTYPE_LOG_FORMAT is neither of the two.
    """
    wanted = os.environ.get(VARIABLE) or default
    if wanted not in ("json", "text"):
        raise InvalidRequest(f"{VARIABLE} must be json or text, not {wanted!r}.")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if wanted == "json" else TextFormatter())
    handler.set_name("calotype")
    handler.addFilter(Repeats())
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "calotype"]:
        root.removeHandler(old)
    root.addHandler(handler)
    if root.level in (logging.NOTSET, logging.WARNING):
        root.setLevel(level)
    for noisy in ("httpx", "httpcore"):  # they write addresses with their signatures
        logging.getLogger(noisy).setLevel(logging.WARNING)
