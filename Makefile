# Every target builds the virtual environment it needs, anew when pyproject.toml changed.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= qwen2_5_vl
WORKERS ?= 2
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
# Large buffers stay with the process between steps: CPU inference and training are faster.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo test test-eval test-pages test-vllm test-upstream nightly check format clean

demo: $(STAMP)
	$(VENV)/bin/mha2mla demo --model $(MODEL)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS)

# lmms-eval itself, on the shipped models
test-eval: $(VENV)/.installed-eval
	$(VENV)/bin/python -m pytest -m eval tests/harness

# the pages in a headless browser (Debian: apt install chromium chromium-driver), and transformers serve
test-pages: $(VENV)/.installed-pages
	$(VENV)/bin/python -m pytest -m pages tests/pages

# vLLM for CPUs, in an environment of its own: it pins its PyTorch
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/serving

# transformers' own tests of each family on converted models; TRANSFORMERS is a checkout of the release installed
test-upstream: $(VENV)/.installed-upstream
	TRANSFORMERS_TESTS=$(TRANSFORMERS) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal \
		-m upstream tests/transformers_suite

# all that CI has no time for, too
nightly: check test test-eval test-pages test-vllm $(if $(TRANSFORMERS),test-upstream)
	$(VENV)/bin/python -m pytest -m slow $(TESTS)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist

$(VENV)/.installed-eval: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --editable '.[eval]'
	touch $@

$(VENV)/.installed-pages: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --editable '.[chat,serve]' selenium
	touch $@

$(VENV)/.installed-upstream: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet parameterized requests
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml tests/serving/install.sh
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	sh tests/serving/install.sh $(VLLM_VENV)/bin/python
	touch $@

$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@
