"""What Ray must find in the environment before it is imported, where it is ours alone."""

from __future__ import annotations

import os
import secrets

LARGEST_MESSAGE = 2**31 - 1


def prepare_ray() -> None:
    """Closes Ray to others, and shortens its calls. What the environment says already stays.

    Ray's processes listen on every interface of the machine and do what they are asked: a token
    that only they know keeps others out (https://docs.ray.io/en/latest/ray-security/token-auth.html).
    Replicas call each other by gRPC instead of through the object store, which takes half the time;
    messages may be as large as pictures and embeddings are.
    """
    if not os.environ.get("RAY_AUTH_MODE"):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(LARGEST_MESSAGE))
