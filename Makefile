# Every target stands alone: it makes the virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARK := $(BIN)/moe-posterior benchmark --first-seed 200
COMPARED := --gates posterior "posterior of the paper" softmax "expert threshold" ucb1

.DEFAULT_GOAL := help
.PHONY: help install demo cifar10h benchmarks latency test test-slow check format clean

help:  ## say what can be made
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)  ## make .venv with everything pinned in constraints.txt

demo: $(INSTALLED)  ## train both gates on scikit-learn's digits, evaluate under shift, print the table (about 2 minutes)
	$(BIN)/moe-posterior fit --config configs/demo.yaml --overwrite
	$(BIN)/moe-posterior evaluate --run runs/demo

cifar10h: $(INSTALLED)  ## the README's CIFAR-10H run: 12 epochs, both gates (about 40 minutes on 2 cores), resumable
	$(BIN)/moe-posterior fit --config configs/cifar10h.yaml
	$(BIN)/moe-posterior evaluate --run runs/cifar10h --copy-to results/cifar10h

benchmarks: $(INSTALLED)  ## the routing benchmarks of results/benchmarks (about 15 minutes on 2 cores), resumable
	mkdir -p results/benchmarks
	$(BENCHMARK) b --environments synthetic --ablation --out results/benchmarks/b.json
	$(BENCHMARK) c --environments synthetic $(COMPARED) --out results/benchmarks/c.json
	$(BENCHMARK) a --environments synthetic $(COMPARED) --out results/benchmarks/a.json
	$(BENCHMARK) b --environments digits $(COMPARED) --out results/benchmarks/b_digits.json
	$(BENCHMARK) c --environments digits $(COMPARED) --out results/benchmarks/c_digits.json

latency: $(INSTALLED)  ## how long a decision takes, written to results/benchmarks (2 minutes on an idle machine)
	mkdir -p results/benchmarks
	$(BIN)/moe-posterior benchmark latency --seeds 3 --out results/benchmarks/latency.json --markdown results/benchmarks/latency.md

test: $(INSTALLED)  ## run the whole test suite but what is marked slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

test-slow: $(INSTALLED)  ## run what is marked slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)  ## ruff, mypy and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moe_posterior
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_imports.py

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; runs/ and results/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
