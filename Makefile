# Two commands do all: `make demo` and `make test`. Each makes the environment in .venv first, if need be.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.made-$(subst =,-,$(TORCH))

# A process imports 2,300 files of Python: 16 s of compiling on a slow core, or 6 without, where a shell forbids to keep bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test durations gpu-check lint docs clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# mypy beside the tests: it takes half a minute of one core. tests/conftest.py puts long files first.
test: $(STAMP)
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports
	@$(BIN)/python -m mypy > $(VENV)/mypy.txt 2>&1 & types=$$!; \
	$(PYTEST) --durations 40; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.txt; exit $$((tests + types))

# what each file of tests takes, on two idle cores: tests/durations.json, by which tests/conftest.py orders them
durations: $(STAMP)
	$(PYTEST) --record-durations

# in the environment that has the GPU's torch: PYTHON
gpu-check:
	$(PYTHON) tests/gpu/check.py

lint: $(STAMP)
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

# the site, in build/site; the tests build it too (tests/docs/test_site.py)
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch is named, so that nothing chooses another build of it; what is imported is compiled then, most is never imported
$(STAMP): pyproject.toml
	@echo "making $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check numpy "$(TORCH)" -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
