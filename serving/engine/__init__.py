"""Plain PyTorch: FLUX.2 components and the denoise loop, without Ray or HTTP."""
