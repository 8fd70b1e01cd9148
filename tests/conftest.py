"""Shared fixtures: every family by name, and one thread a test process where cores are few."""

import sys
from pathlib import Path

import pytest

from mha2mla_vlm.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """Each supported family's model type in turn."""
    return request.param
