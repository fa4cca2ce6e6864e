# Two commands for a new user: `make demo` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs wheel nightly bench clean

# torch first, from wherever pip finds the CPU build: nothing below may pull a CUDA build.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/cpu/*.h kernels/cpu/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet ninja numpy -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo.main

# Two files at a time: many tests wait for processes more than they compute. OpenMP's idle
# threads sleep: by default they spin, which took a fifth of the CPU from those that compute.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict -f tools/docs/mkdocs.yml

docs: $(VENV)/.installed
	$(BIN)/python -m tools.docs
	$(BIN)/mkdocs build --strict -f tools/docs/mkdocs.yml

# What a user gets who has no checkout.
wheel: $(VENV)/.installed
	$(BIN)/python -m tools.wheel_check

# Hours; goes on where the last start ended. Options: make nightly NIGHTLY="--venvs DIR interpreters"
nightly: $(VENV)/.installed
	$(BIN)/python -m tools.nightly.main $(NIGHTLY)

bench: $(VENV)/.installed
	$(BIN)/python -m tools.bench.rblock_size
	$(BIN)/python -m tools.bench.micro_attention

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
