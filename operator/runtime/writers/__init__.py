"""What the operator writes to the cluster: children, statuses, events and finalizers."""
