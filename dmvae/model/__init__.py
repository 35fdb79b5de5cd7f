"""The DMVAE: objective, latents, generation, and its folder on disk."""
