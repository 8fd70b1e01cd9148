# Every target builds the virtual environment it needs, anew when pyproject.toml changed.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= qwen2_5_vl
WORKERS ?= 2
STAMP := $(VENV)/.installed
# Large buffers stay with the process between steps: CPU inference and training are faster.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo test check format clean

demo: $(STAMP)
	$(VENV)/bin/mha2mla demo --model $(MODEL)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist

$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@
