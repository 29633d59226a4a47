"""The process that holds Ray: its driver, its node, and the HTTP side of the model apps in it."""
