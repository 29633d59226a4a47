"""What the operator needs while it runs: watching, queue, store, health."""
