"""Families, and converted models whose keys are rotated when they are written and when they are read."""

import functools

import pytest
from helpers import random_mla

from mha2mla_vlm.model.shipped import ZOO_NAMES

NORMED = "qwen3_vl"
FIRST = ZOO_NAMES[0]
HYBRIDS = ("gemma3", "gemma4", "gemma4-moe", "gemma4_unified", "qwen3_5_moe")  # but for the fast one
FAST = ("test_attention.py", "test_rotated_at_read.py")  # of it; the rest is slow


@pytest.fixture(params=ZOO_NAMES)
def family(request):
    """Families of the zoo; `test_families.py` has all others."""
    return request.param


@pytest.fixture(params=["qwen3_5", *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS)])
def name(request):
    """Each very small hybrid model in turn."""
    return request.param


@pytest.fixture(params=["write", "read"])
def rotate_at(request):
    """When keys are rotated."""
    return request.param


@pytest.fixture(params=["write", "read"])
def mla(request):
    """`helpers.random_mla` of each in turn."""
    return functools.partial(random_mla, rotate_at=request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A `long` test is fast for the first family only, and few are for the one with normed keys."""
    for item in items:
        name = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        if name is None or "equivalence" not in item.path.parts:
            continue
        is_long = item.get_closest_marker("long") is not None
        if (name == NORMED and item.path.name not in FAST) or (is_long and name != FIRST):
            item.add_marker("slow")
