"""Commands that make a model yours: data sets, trainings, adapters."""
