"""Routes of training: data sets, and the rights to learn from pictures."""
