"""The components of a FLUX.2 model: text encoder, denoiser, VAE, weights."""
