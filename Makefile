# Every target builds the virtual environment it needs, anew when pyproject.toml or the versions in constraints*.txt changed.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= qwen2_5_vl
WORKERS ?= 2
STAMP := $(VENV)/.installed
INSTALL := $(VENV)/bin/python -m pip install --quiet -c constraints.txt
VLLM_VENV ?= .venv-vllm
OLDEST_VENV ?= .venv-oldest
LATEST_VENV ?= .venv-latest
SCRATCH_VENV ?= .venv-constraints
# The PyTorch of constraints.txt, which every machine can install; `make latest` tries the newest
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Large buffers stay with the process between steps: CPU inference and training are faster.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo test test-eval test-pages test-vllm test-upstream oldest oldest-quick latest nightly gpu check format \
	constraints docs clean

demo: $(STAMP)
	$(VENV)/bin/mha2mla demo --model $(MODEL)

test: $(VENV)/.installed-libraries
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS)

# lmms-eval itself, on the shipped models
test-eval: $(VENV)/.installed-eval
	$(VENV)/bin/python -m pytest -m eval tests/harness

# the pages in a headless browser (Debian: apt install chromium chromium-driver), and transformers serve
test-pages: $(VENV)/.installed-pages
	$(VENV)/bin/python -m pytest -m pages tests/pages

# vLLM for CPUs, in an environment of its own: it pins its PyTorch
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m "vllm and not slow" tests/serving

# all that needs a GPU, in the Python that PYTHON is, without a network: tests, and figures for docs/gpu
gpu:
	$(PYTHON) benchmarks/gpu.py

# transformers' own tests of each family on converted models; TRANSFORMERS is a checkout of the release installed
test-upstream: $(VENV)/.installed-upstream
	TRANSFORMERS_TESTS=$(TRANSFORMERS) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal \
		-m upstream tests/transformers_suite

# the oldest versions that pyproject.toml declares
oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/equivalence tests/cli

# of those: one family, where other packages' interfaces are used most; mathematics, files, locks and signals are the same everywhere
QUICK := $(foreach name,alone checkpoint generation generation_caches ordinary_model rotated_at_read training trl, \
	tests/equivalence/test_$(name).py) \
	$(foreach name,commands finetune report bench hub,tests/cli/test_$(name).py)
oldest-quick: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" -k "not llava" $(QUICK)

# the newest versions there are, whatever pyproject.toml declares; then how they differ from constraints.txt
latest:
	$(PYTHON) -m venv --clear $(LATEST_VENV)
	$(LATEST_VENV)/bin/python scripts/versions.py newest dev libraries > $(LATEST_VENV)/requirements.txt
	$(LATEST_VENV)/bin/python -m pip install --quiet -r $(LATEST_VENV)/requirements.txt
	$(LATEST_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	$(LATEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS); result=$$?; \
	$(LATEST_VENV)/bin/python scripts/versions.py changes constraints.txt; exit $$result

# the documentation as a site, in site/; broken links and pages that no menu has are errors
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# what `.ci/run` runs, and all that it has no time for
nightly: check test test-eval docs oldest test-pages test-vllm $(if $(TRANSFORMERS),test-upstream)
	$(VENV)/bin/python -m pytest -m slow $(TESTS)
	$(VLLM_VENV)/bin/python -m pytest -m "vllm and slow" tests/serving

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# constraints*.txt anew, with Python 3.11: the newest versions within the bounds of pyproject.toml, the oldest, vLLM's
constraints:
	$(PYTHON) -m venv --clear $(SCRATCH_VENV)
	$(SCRATCH_VENV)/bin/python -m pip install --quiet $(TORCH) --editable '.[all,dev,docs,libraries]' selenium
	$(SCRATCH_VENV)/bin/python scripts/versions.py installed constraints.txt
	$(PYTHON) -m venv --clear $(SCRATCH_VENV)
	$(SCRATCH_VENV)/bin/python scripts/versions.py oldest dev > $(SCRATCH_VENV)/requirements.txt
	$(SCRATCH_VENV)/bin/python -m pip install --quiet -r $(SCRATCH_VENV)/requirements.txt
	$(SCRATCH_VENV)/bin/python scripts/versions.py installed constraints-oldest.txt
	$(PYTHON) -m venv --clear $(SCRATCH_VENV)
	sh tests/serving/install.sh $(SCRATCH_VENV)/bin/python
	$(SCRATCH_VENV)/bin/python scripts/versions.py installed constraints-vllm.txt
	rm -rf $(SCRATCH_VENV)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) $(LATEST_VENV) $(SCRATCH_VENV) build dist site

# what tests try converted models with; torchao warns wherever it is installed, so `demo` has it not
$(VENV)/.installed-libraries: $(STAMP)
	$(INSTALL) --editable '.[libraries]'
	touch $@

$(VENV)/.installed-eval: $(STAMP)
	$(INSTALL) --editable '.[eval]'
	touch $@

# what the extra names, without building the project anew
$(VENV)/.installed-docs: $(STAMP)
	$(VENV)/bin/python scripts/versions.py newest docs > $(VENV)/docs.txt
	$(INSTALL) -r $(VENV)/docs.txt
	touch $@

$(VENV)/.installed-pages: $(STAMP)
	$(INSTALL) --editable '.[chat,serve]' selenium
	touch $@

$(VENV)/.installed-upstream: $(STAMP)
	$(INSTALL) parameterized requests
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt tests/serving/install.sh
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	sh tests/serving/install.sh $(VLLM_VENV)/bin/python -c constraints-vllm.txt
	touch $@

$(OLDEST_VENV)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -c constraints-oldest.txt --editable '.[dev]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@
