"""Converted models whose keys are rotated when they are written, and when they are read."""

import functools

import pytest
from helpers import random_mla


@pytest.fixture(params=["write", "read"])
def mla(request):
    """`helpers.random_mla` of each in turn."""
    return functools.partial(random_mla, rotate_at=request.param)
