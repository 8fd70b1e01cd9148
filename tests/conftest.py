"""Shared fixtures: families of the zoo by name, and one thread a test process, as several share two cores."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mha2mla_vlm.model.shipped import ZOO_NAMES

if not torch.cuda.is_available():  # read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    """Keep parallel workers from fighting over cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(params=sorted(ZOO_NAMES))
def family(request):
    """Each family of the zoo in turn; `equivalence/conftest.py` has all that are supported."""
    return request.param


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A server of commands in forks of one process."""
    from forks import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as running:
        yield running


@pytest.fixture(scope="session")
def workspace_for_forks(tmp_path_factory):
    """What commands in forks read; they write elsewhere."""
    from forks import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))
