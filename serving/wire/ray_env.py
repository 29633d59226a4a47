"""What Ray reads from the environment about calls between replicas; the same in pods and alone."""

from __future__ import annotations

RAY_CALLS = {
    # Otherwise answers are items of a stream that is kept in Ray's object store. That takes twice
    # as long, and worse: an answer to a caller whose node is gone blocks the event loop of whoever
    # gives it (TaskGeneratorBackpressureWaiter) until Ray believes the death, for half a minute.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # As large as pictures and embeddings are.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
