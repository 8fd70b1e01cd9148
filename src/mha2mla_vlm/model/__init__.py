"""Converted models: attention over latents, its cache and kernels, classes, checkpoints."""
