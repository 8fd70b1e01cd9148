"""Tests of transformers that a converted model fails, and why. By family, or for all."""

EXCEPTIONS: dict[str, dict[str, str]] = {
    "all": {},
}
