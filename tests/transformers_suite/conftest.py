"""Finds a checkout of transformers, and registers the markers that its tests use."""

import os
import re
import sys
from pathlib import Path

CHECKOUT = os.environ.get("TRANSFORMERS_TESTS")
if CHECKOUT:
    for folder in (Path(CHECKOUT), Path(CHECKOUT, "utils")):  # `tests`, and `test_module` that it imports
        sys.path.insert(0, str(folder))


def pytest_configure(config):
    """Markers are strict here, and theirs are in settings that are not read."""
    if CHECKOUT:
        sources = [*Path(CHECKOUT, "tests").glob("*.py"), *Path(CHECKOUT, "tests").glob("[eg]*/test_*.py")]
        sources.append(Path(CHECKOUT, "src", "transformers", "testing_utils.py"))
        code = "".join(path.read_text(encoding="utf-8") for path in sources)
        for name in sorted(set(re.findall(r"\bmark\.(\w+)", code))):
            config.addinivalue_line("markers", f"{name}: of transformers' tests")
