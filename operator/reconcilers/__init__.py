"""One reconcile of one object, a file for each kind."""
