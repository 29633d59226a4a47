"""What Ray must find in the environment before it is imported, where it is ours alone."""

from __future__ import annotations

import os
import secrets

from calotype.serving.wire.ray_env import RAY_CALLS

_QUIET_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Replicas set the threads of torch themselves; libraries shall not start others beside them."""


PATIENCE = {
    # A process of a replica that has not come up after 60 s is given up, and with the first ones
    # the whole start waits for ever; a busy machine takes longer to import Ray.
    "RAY_worker_register_timeout_seconds": "600",
}


def prepare_ray(start_seconds: float) -> None:
    """Closes Ray to others, and shortens its calls. What the environment says already stays.

    Replicas inherit the environment. Told by a ``runtime_env`` instead, each of them would import
    Ray twice, and none could use the processes that Ray has started ahead.

    Ray's processes listen on every interface of the machine and do what they are asked: a token
    that only they know keeps others out (https://docs.ray.io/en/latest/ray-security/token-auth.html).

    Args:
        start_seconds: for so long the start of Ray's processes is waited for.
    """
    if not os.environ.get("RAY_AUTH_MODE"):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    waiting = {"RAY_gcs_server_port_wait_time_s": str(round(start_seconds))}
    for name, value in (RAY_CALLS | PATIENCE | waiting).items():
        os.environ.setdefault(name, value)
    os.environ.update(_QUIET_THREADS)
