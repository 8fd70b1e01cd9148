"""Families, and converted models whose keys are rotated when they are written and when they are read."""

import functools

import pytest
from helpers import random_mla

from mha2mla_vlm.model.shipped import ZOO_NAMES

NORMED = "qwen3_vl"
FAST = ("test_attention.py", "test_rotated_at_read.py")  # of it; the rest is slow


@pytest.fixture(params=[*ZOO_NAMES, NORMED])
def family(request):
    """Families of the zoo, and one with normed queries and keys; `test_families.py` has all others."""
    return request.param


@pytest.fixture(params=["write", "read"])
def mla(request):
    """`helpers.random_mla` of each in turn."""
    return functools.partial(random_mla, rotate_at=request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Every test is fast for the families of the zoo only."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.get("family") == NORMED and "equivalence" in item.path.parts and item.path.name not in FAST:
            item.add_marker("slow")
