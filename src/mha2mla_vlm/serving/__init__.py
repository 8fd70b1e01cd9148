"""Converted models at work: in vLLM, on a page, in a terminal."""
