"""What the service costs: start, idle memory, and what the API adds to the engine's own time.

The service is started as a user starts it. Engine and API are timed in turn, in one run.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil

from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.core.request import GenerationRequest, ImageSize, SamplingParams
from calotype.serving.weights.sources import model_folder

KEY = "ct_live_benchmark_key"
SAME = ["a large red circle on a blue background"] * 15
"""One prompt with other seeds: text encoder and safety stage have seen it."""
NEW = [
    f"a large {color} {shape} on a {ground} background"
    for color, ground in (("red", "white"), ("blue", "yellow"), ("green", "black"))
    for shape in ("circle", "square", "ring", "heart", "diamond")
]


def measure() -> dict[str, dict[str, Any]]:
    """name -> value, unit, bar, better."""
    with tempfile.TemporaryDirectory() as folder:
        with running(pathlib.Path(folder) / "warm"):
            pass  # fills the page cache
        started = time.monotonic()
        with running(pathlib.Path(folder) / "measured") as (url, process):
            start_seconds = time.monotonic() - started
            # One client with its connection, as the SDKs keep it.
            with httpx.Client(
                base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=120
            ) as client:
                draw(client, SAME[0], 0)
                engine = engine_timer()
                engine(SAME[0], 0)
                same_engine, same_api = timed_in_turn(engine, client, SAME)
                new_engine, new_api = timed_in_turn(engine, client, NEW)
            del engine
            memory = idle_memory(process)
        torch_seconds = statistics.median(import_torch() for _ in range(3))
    return {
        "start to first answer, warm page cache": entry(
            start_seconds / torch_seconds, "x import torch", 10, "lower"
        ),
        "the same in seconds": entry(start_seconds, "s", None, "lower"),
        "idle memory of all processes (PSS)": entry(memory / 1e9, "GB", 3, "lower"),
        "API / engine, a prompt seen before": entry(same_api / same_engine, "x", 1.5, "lower"),
        "API / engine, a new prompt": entry(new_api / new_engine, "x", 1.5, "lower"),
        "engine alone, a new prompt": entry(new_engine, "s", None, "lower"),
        "through the API, a new prompt": entry(new_api, "s", None, "lower"),
    }


def import_torch() -> float:
    """Seconds in which a new process imports torch: the measure of this machine's start-ups."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begun


def timed_in_turn(
    engine: Callable[[str, int], float], client: httpx.Client, prompts: list[str]
) -> tuple[float, float]:
    """Median seconds of one 128x128, 20-step picture: of the engine, and through the API."""
    engine_times, api_times = [], []
    for seed, prompt in enumerate(prompts, start=1):
        engine_times.append(engine(prompt, seed))
        begun = time.perf_counter()
        draw(client, prompt, seed)
        api_times.append(time.perf_counter() - begun)
    return statistics.median(engine_times), statistics.median(api_times)


def entry(value: float, unit: str, bar: float | None, better: str) -> dict[str, Any]:
    return {"value": round(value, 3), "unit": unit, "bar": bar, "better": better}


def engine_timer() -> Any:
    """A function that draws one picture with the engine in this process and returns the seconds."""
    from calotype.serving.engine.engine import Engine
    from calotype.serving.engine.model.components import load_components

    components = load_components(model_folder(BUILT_IN_MODEL))
    engine = Engine(components, torch_threads=1)

    def run(prompt: str, seed: int) -> float:
        begun = time.perf_counter()
        size = ImageSize(128, 128)
        sampling = SamplingParams(20, 2.5)
        engine.add(GenerationRequest(f"r{seed}", prompt, size, size, sampling, seed))
        while engine.has_work:
            engine.step()
        return time.perf_counter() - begun

    return run


def draw(client: httpx.Client, prompt: str, seed: int) -> None:
    answer = client.post(
        "/v1/images/generations",
        json={
            "prompt": prompt,
            "size": "128x128",
            "steps": 20,
            "seed": seed,
            "response_format": "b64_json",
        },
    )
    answer.raise_for_status()


def idle_memory(process: subprocess.Popen[bytes]) -> float:
    """Bytes: the sum of the proportional set sizes of the service and all its children."""
    family = psutil.Process(process.pid)
    total = 0
    for member in [family, *family.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_full_info().pss
    return float(total)


@contextlib.contextmanager
def running(data_dir: pathlib.Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "calotype.serving", "serve"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--data-dir", str(data_dir)],
        env={**os.environ, "CALOTYPE_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("the service ended while starting")
            time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
