"""Ray Serve only, thin: the model app."""
