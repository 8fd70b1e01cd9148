"""Every supported family, and converted models whose keys are rotated when they are written and when they are
read.
"""

import functools

import pytest
from helpers import random_mla

from mha2mla_vlm.model.families import FAMILIES
from mha2mla_vlm.model.shipped import ZOO_NAMES

FAST = {
    "qwen3_vl": ("test_attention.py", "test_rotated_at_read.py")
}  # of the other families `test_families.py`


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """Each supported family's model type in turn."""
    return request.param


@pytest.fixture(params=["write", "read"])
def mla(request):
    """`helpers.random_mla` of each in turn."""
    return functools.partial(random_mla, rotate_at=request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The whole matrix is fast for the families of the zoo only."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if name in FAMILIES and name not in ZOO_NAMES and item.path.name not in FAST.get(name, ()):
            item.add_marker("slow")
