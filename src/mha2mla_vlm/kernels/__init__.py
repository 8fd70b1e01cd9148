"""Fused attention over latents. Importing a module here needs what it is written in."""
