PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo dev test check docs bench bench-quick chaos fuzz fmt clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## Make .venv with everything: tools, Valkey and Postgres included

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Mollifier needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11" >&2; \
		exit 1; }
	@echo "Installing into .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.ready ## Show a burst meeting the front door
	@$(BIN)/mollifier demo

dev: .venv/.ready ## Run everything on this machine, servers included
	@$(BIN)/mollifier dev

test: .venv/.ready ## Run the tests
	@$(BIN)/pytest

check: .venv/.ready ## Check format, lint, imports and types, then run the tests
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make fmt'" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@report=$$($(BIN)/lint-imports) || { echo "$$report" >&2; exit 1; }
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory test

docs: .venv/.ready ## Write docs/asyncapi.json, the wire as a document, from the schemas
	@$(BIN)/python -m app.asyncapi docs/asyncapi.json

bench: .venv/.ready bench/node/node_modules ## Measure ours beside others (10 minutes), and write docs/benchmarks.md
	@$(BIN)/python -m bench --write docs/benchmarks.md

bench-quick: .venv/.ready bench/node/node_modules ## Is the mollify path, or the drain, slower than it was? (1 minute)
	@$(BIN)/python -m bench --only mollify,drain --share 0.5 --guard

# Without npm the comparison that needs it says that it was not measured.
bench/node/node_modules: bench/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix bench/node --silent --no-audit --no-fund && touch $@; fi

chaos: .venv/.ready ## A storm with faults of SECONDS (600), seeded by SEED (1)
	@$(BIN)/python -m tests.chaos.run --seed $(or $(SEED),1) --seconds $(or $(SECONDS),600)

fuzz: .venv/.ready ## COUNT (100000) hostile requests, seeded by SEED (1)
	@$(BIN)/python -m tests.fuzz.run --seed $(or $(SEED),1) --count $(or $(COUNT),100000)

fmt: .venv/.ready ## Format the code and repair what ruff can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove .venv, caches and the data of `make dev`
	@rm -rf .venv .mollifier bench/node/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
