"""How well the safety stage does, and how its classifiers are trained."""
