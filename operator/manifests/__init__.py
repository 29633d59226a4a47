"""Pure builders: from a spec to the manifests that realise it."""
