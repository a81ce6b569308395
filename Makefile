# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer, and nothing else.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SECONDS ?= 40

.PHONY: demo test test-train test-plant fuzz lint types bundle bench bench-detection models clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(BIN)/python -c "import opcua_detector.service"  # compiles the kernels once, into the cache
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	touch $@

$(VENV)/.train: $(VENV)/.dev
	$(PIP) --editable ".[dev,train]"
	touch $@

demo: $(VENV)/.base  ## both simulated plants: learn, detect a fault, explain it, see it clear
	$(BIN)/opcua-detector demo --process lorenz --seconds $(SECONDS)
	$(BIN)/opcua-detector demo --process throttle --seconds $(SECONDS)

test: $(VENV)/.dev  ## all tests that need neither torch nor Node.js nor minutes
	$(BIN)/python -m pytest -m "not train and not plant" $(PYTEST_ARGS)

test-train: $(VENV)/.train  ## tests that train with torch
	$(BIN)/python -m pytest -m train $(PYTEST_ARGS)

NODE_OPCUA := tests/plant/node_opcua/node_modules/.installed

$(NODE_OPCUA): tests/plant/node_opcua/package.json tests/plant/node_opcua/package-lock.json
	cd tests/plant/node_opcua && npm ci --no-audit --no-fund --loglevel=error
	touch $@

test-plant: $(VENV)/.dev $(NODE_OPCUA)  ## faults that take minutes, and a second vendor's server (needs Node.js 20)
	$(BIN)/python -m pytest -m plant $(PYTEST_ARGS)

fuzz: $(VENV)/.dev  ## a minute of hostile bytes for the decoders
	$(BIN)/python tests/fuzz/fuzz_wire.py --seconds 60

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

# What needs the shared data, or many minutes, is left to `bench-detection`.
LONG := $(addprefix tests/benchmarks/bench_,soak.py recovery.py)  # an hour, and every fault on two servers
DETECTION := $(addprefix tests/benchmarks/bench_,public.py paper.py faults.py explain.py)

bench: $(VENV)/.dev  ## times and sizes the README quotes
	for b in $(filter-out $(DETECTION) $(LONG),$(wildcard tests/benchmarks/bench_*.py)); do \
		echo "== $$b"; $(BIN)/python $$b || exit 1; done

bench-detection: $(VENV)/.dev  ## what the README says of detection, against peers; data: OPCUA_DETECTOR_DATA
	for b in $(DETECTION); do echo "== $$b"; $(BIN)/python $$b || exit 1; done

bundle: $(VENV)/.base  ## wheelhouse/: wheels, hashes and a requirements file for an install without a network
	rm -rf wheelhouse && mkdir wheelhouse
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --constraint constraints.txt --wheel-dir wheelhouse .
	$(BIN)/python tests/bundle_hashes.py wheelhouse
	@echo "offline: pip install --no-index --find-links wheelhouse --require-hashes -r wheelhouse/requirements.txt"

clean:
	rm -rf $(VENV) build dist wheelhouse *.egg-info
