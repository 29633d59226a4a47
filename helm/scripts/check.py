"""`helm test`: the gateway answers, and its key opens the list of models."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

PATIENCE_SECONDS = 60.0
"""A Service has its endpoints some seconds after the pods are ready."""


def ask(url: str, key: str | None = None) -> tuple[int, str]:
    """Status and text of the answer.

    Raises:
        OSError: nobody answers.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=10, context=trust()) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def trust() -> ssl.SSLContext | None:
    """Trusts the gateway's own certificate, whatever name it is for; None without one."""
    certificate = os.environ.get("CALOTYPE_CERTIFICATE")
    if certificate is None:
        return None
    context = ssl.create_default_context(cadata=certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def main() -> int:
    gateway, key = os.environ["CALOTYPE_URL"], os.environ["CALOTYPE_API_KEY"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            status, text = ask(f"{gateway}/v1/models", key)
            break
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > deadline:
                print(f"{gateway} does not answer: {error}", file=sys.stderr)
                return 1
            time.sleep(1)
    if status != 200:
        print(f"GET /v1/models with the first API key: {status} {text}", file=sys.stderr)
        return 1
    names = [model["id"] for model in json.loads(text)["data"]]
    print(f"The gateway serves {', '.join(names) if names else 'no model yet'}.")
    status, _ = ask(f"{gateway}/v1/models", "ct_live_nobody_has_this_key")
    if status != 401:
        print(f"GET /v1/models with a wrong key: {status} instead of 401", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
