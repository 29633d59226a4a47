"""What may pass: policies, their rules and presets, and what a refused caller is told."""
