"""``make demo``: the service, one picture through OpenAI's own client, and what to try next."""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx

PROMPT = "a large white heart on a red background"
START_SECONDS = 600.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calotype.serving.commands.demo", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/demo.png"))
    arguments = parser.parse_args(argv)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    key = "ct_live_" + secrets.token_urlsafe(32)
    try:
        with running_service(key) as url:
            draw(url, key, arguments.prompt, arguments.output)
    except DemoFailed as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    print(NEXT_STEPS)
    return 0


class DemoFailed(Exception):
    """One sentence."""


@contextlib.contextmanager
def running_service(key: str) -> Iterator[str]:
    """`calotype serve` on a free port with a data folder of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="calotype-demo-") as folder:
        command = [sys.executable, "-m", "calotype.serving", "serve"]
        process = subprocess.Popen(
            [*command, "--port", str(port), "--data-dir", folder],
            env={**os.environ, "CALOTYPE_API_KEY": key},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def draw(url: str, key: str, prompt: str, output: pathlib.Path) -> None:
    """One picture, asked for as any product team would."""
    from openai import OpenAI

    print(f'Asking through the openai package: "{prompt}"')
    started = time.monotonic()
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        answer = client.images.generate(
            model="dall-e-3",
            prompt=prompt,
            response_format="b64_json",
            extra_body={"seed": 7},
        )
    pictures = answer.data or []
    if not pictures or not pictures[0].b64_json:
        raise DemoFailed("the service answered without a picture.")
    output.write_bytes(base64.b64decode(pictures[0].b64_json))
    print(f"{output} is drawn: {answer.size}, seed 7, {time.monotonic() - started:.1f} s.")


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed("the service ended while starting; its last words are above.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise DemoFailed(f"the service was not ready within {START_SECONDS:.0f} s.")


NEXT_STEPS = """
Next:
  .venv/bin/calotype generate "a small green star, white background" -o star.png
  .venv/bin/calotype generate "a blue circle" --lora serving/weights/embedded/stripes.safetensors
  .venv/bin/calotype serve              # then use any OpenAI SDK with its base URL and key
  .venv/bin/calotype plan --gpu a100-80gb     # what FLUX.2 [dev] needs"""


if __name__ == "__main__":
    sys.exit(main())
