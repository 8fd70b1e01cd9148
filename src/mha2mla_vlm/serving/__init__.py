"""Converted models inside serving engines."""
