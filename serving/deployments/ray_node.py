"""Ray on this machine alone, for `calotype serve` and `calotype model-app`."""

from __future__ import annotations

import contextlib
import io
import logging
import os

import ray

from calotype.serving.core.errors import ModelLoadFailed

OBJECT_STORE_BYTES = 100 * 1024 * 1024


def start_ray(*, log_to_driver: bool) -> None:
    """Starts Ray's processes; from the main thread, since they die with the thread that asked.

    Args:
        log_to_driver: whether what replicas write appears here.

    Raises:
        ModelLoadFailed: they did not come up, for instance for want of memory or time.
    """
    try:
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=log_to_driver,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises whatever its processes could not do
        with contextlib.redirect_stderr(io.StringIO()):
            ray.shutdown()
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ModelLoadFailed(
            f"Ray could not be started: {said}. Free memory and room in /dev/shm and try again; "
            "its logs are in session_latest/logs of $RAY_TMPDIR, or else of /tmp/ray."
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
