"""Where latents are kept: in a growing cache, in 8, 4 or 2 bits, in pages that requests share."""
