"""From a request body to a durable job, and from a finished job to a response."""
