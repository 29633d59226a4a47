"""From noise to an image: noise schedule, samplers, guidance."""
