"""The custom resource definitions and their conditions."""
