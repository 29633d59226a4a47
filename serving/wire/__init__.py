"""Documents that one process writes and another one reads; the operator may import them too."""
