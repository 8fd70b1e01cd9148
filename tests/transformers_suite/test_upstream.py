"""transformers' own tests of each family's model classes, on the converted ones; make test-upstream."""

import os

import pytest
from exceptions import EXCEPTIONS
from suite import converted_case

from mha2mla_vlm.model.shipped import ZOO_NAMES

pytestmark = pytest.mark.upstream
if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS is not set: a checkout of transformers", allow_module_level=True)

for _family in ZOO_NAMES:
    _case = converted_case(_family, EXCEPTIONS["all"] | EXCEPTIONS.get(_family, {}))
    globals()[_case.__name__] = _case
del _case
