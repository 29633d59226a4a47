"""Documents that one process writes and another one reads; each is defined once, and versioned."""
