# Every target works on its own: it creates the virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARK := $(BIN)/moe-posterior benchmark
RESULTS := results/benchmarks
COMPARED := --gates posterior "posterior of the paper" softmax "expert threshold" ucb1

.DEFAULT_GOAL := help
.PHONY: help install docs examples wheel demo cifar10h cifar10h-features tables benchmarks benchmarks-data swap-table lm audit-bench latency bench bench-gpu test test-slow check format clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)  ## create .venv with the versions pinned in constraints.txt

demo: $(INSTALLED)  ## train three gates on digits, evaluate under shift, break an expert, print the tables (about 2 minutes)
	$(BIN)/moe-posterior fit --config configs/demo.yaml --overwrite
	$(BIN)/moe-posterior evaluate --run runs/demo --damage --copy-to results/demo

cifar10h: $(INSTALLED)  ## train and evaluate both gates on CIFAR-10H, 12 epochs (about 40 minutes on 2 cores), resumable
	$(BIN)/moe-posterior fit --config configs/cifar10h.yaml
	$(BIN)/moe-posterior evaluate --run runs/cifar10h --copy-to results/cifar10h

benchmarks: $(INSTALLED)  ## run the routing benchmarks of results/benchmarks (about 30 minutes on 2 cores), resumable
	mkdir -p $(RESULTS)
	$(BENCHMARK) b --first-seed 300 --environments synthetic --seeds 10 --out $(RESULTS)/b.parquet --markdown $(RESULTS)/b.md --figures $(RESULTS)
	$(BENCHMARK) c --first-seed 300 --environments synthetic --seeds 10 $(COMPARED) --out $(RESULTS)/c.parquet --markdown $(RESULTS)/c.md --figures $(RESULTS)
	$(BENCHMARK) a --first-seed 300 --environments synthetic digits --seeds 10 $(COMPARED) --out $(RESULTS)/a.parquet --markdown $(RESULTS)/a.md
	$(BENCHMARK) b --first-seed 300 --environments digits --seeds 10 $(COMPARED) --out $(RESULTS)/b_digits.parquet --markdown $(RESULTS)/b_digits.md
	$(BENCHMARK) c --first-seed 300 --environments digits --seeds 10 $(COMPARED) --out $(RESULTS)/c_digits.parquet --markdown $(RESULTS)/c_digits.md
	$(BENCHMARK) b --first-seed 300 --environments synthetic --ablation --gates posterior --out $(RESULTS)/b_ablation.parquet --markdown $(RESULTS)/b_ablation.md
	$(BENCHMARK) c --first-seed 300 --environments synthetic --ablation --gates posterior --out $(RESULTS)/c_ablation.parquet --markdown $(RESULTS)/c_ablation.md
	$(BENCHMARK) b --first-seed 300 --experts 8 --environments synthetic $(COMPARED) --out $(RESULTS)/b_8_experts.parquet --markdown $(RESULTS)/b_8_experts.md
	$(BENCHMARK) b --first-seed 300 --experts 32 --environments synthetic $(COMPARED) --out $(RESULTS)/b_32_experts.parquet --markdown $(RESULTS)/b_32_experts.md

benchmarks-data: $(INSTALLED)  ## run the same on PACS, CIFAR-10 and nine language models; their data must be on this machine
	$(BENCHMARK) b --first-seed 300 --environments pacs cifar10h $(COMPARED) --out $(RESULTS)/b_features.parquet --markdown $(RESULTS)/b_features.md
	$(BENCHMARK) c --first-seed 300 --environments pacs cifar10h $(COMPARED) --out $(RESULTS)/c_features.parquet --markdown $(RESULTS)/c_features.md
	$(BENCHMARK) llm --first-seed 300 $(COMPARED) --out $(RESULTS)/llm.parquet --markdown $(RESULTS)/llm.md

cifar10h-features: $(INSTALLED)  ## train three small ResNets by ERM and keep their features for the study (about an hour on 2 cores)
	for seed in 42 43 44; do \
	  $(BIN)/moe-posterior fit --config configs/cifar10h.yaml --arms softmax --name cifar10h-$$seed --seed_everything $$seed --data.seed $$seed && \
	  $(BIN)/moe-posterior cache --data moe_posterior.training.data.CIFAR10H --data.seed $$seed \
	    --backbone moe_posterior.training.backbones.reduced_resnet --weights runs/cifar10h-$$seed/softmax/checkpoints/last.ckpt \
	    --prefix backbone. --out runs/cifar10h-features-$$seed || exit 1; \
	done

tables: $(INSTALLED)  ## methods, calibrators and seeds on PACS, comments and CIFAR-10H (about 3 hours of one core), resumable
	mkdir -p results/calibration
	$(BIN)/moe-posterior study pacs --out results/calibration/pacs.parquet --markdown results/calibration/pacs.md --figure results/calibration/pacs.png
	$(BIN)/moe-posterior study comments --out results/calibration/comments.parquet --markdown results/calibration/comments.md --figure results/calibration/comments.png
	$(BIN)/moe-posterior study cifar10h --out results/calibration/cifar10h.parquet --markdown results/calibration/cifar10h.md --figure results/calibration/cifar10h.png
	$(BIN)/moe-posterior study summary --from results/calibration/pacs.parquet results/calibration/comments.parquet results/calibration/cifar10h.parquet --markdown results/calibration/summary.md

swap-table: $(INSTALLED)  ## list which transformers models can be swapped: builds and checks a tiny model of every type (2 minutes)
	mkdir -p results/swap
	PYTHONPATH=tests $(BIN)/python -m model_survey.survey --markdown results/swap/models.md --json results/swap/models.json

latency: $(INSTALLED)  ## measure how long a decision takes, into results/benchmarks (2 minutes on an idle machine)
	mkdir -p results/benchmarks
	$(BIN)/moe-posterior benchmark latency --seeds 3 --out results/benchmarks/latency.parquet --markdown results/benchmarks/latency.md

lm: $(INSTALLED)  ## run the language-model experiment on your own TEXT="a.txt b.txt" (hours on 2 cores), resumable
	mkdir -p results/lm
	$(BENCHMARK) lm --text $(TEXT) --out results/lm/lm.parquet --markdown results/lm/lm.md --figures results/lm

audit-bench: $(INSTALLED)  ## measure what the audit log costs, and how soon it shows a failing expert (5 minutes on an idle machine)
	mkdir -p results/audit
	$(BENCHMARK) audit --seeds 5 --out results/audit/speed.parquet --markdown results/audit/speed.md
	$(BENCHMARK) audit --horizon --first-seed 300 --out results/audit/horizon.parquet --markdown results/audit/horizon.md

bench: $(INSTALLED)  ## measure what the gate costs on a CPU, as ratios (3 minutes on an idle machine)
	mkdir -p results/speed
	$(BIN)/python -m moe_posterior.kernels.instruments.bench --threads 1 --json results/speed/cpu.json

bench-gpu: $(INSTALLED)  ## check and then time the kernels on a GPU; without a GPU it only says so
	mkdir -p results/speed
	$(BIN)/python -m moe_posterior.kernels.instruments.bench_gpu --json results/speed/gpu.json

docs: $(INSTALLED)  ## build the documentation into docs/_build; a broken reference fails the build
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "documentation: docs/_build/index.html"

examples: $(INSTALLED)  ## run every example (3 minutes)
	@set -e; for script in examples/*.py examples/notebooks/*.py; do \
	  echo "== $$script"; HF_HUB_OFFLINE=1 $(BIN)/python $$script; \
	done
	@echo "== examples/own_data"
	cd examples/own_data && PYTHONPATH=. ../../$(BIN)/moe-posterior fit --config experiment.yaml --overwrite \
	  && PYTHONPATH=. ../../$(BIN)/moe-posterior evaluate --run runs/tumours \
	  && ../../$(BIN)/moe-posterior fit --config plain.yaml --overwrite
	@echo "== examples/predictions"
	cd examples/predictions && ../../$(BIN)/moe-posterior evaluate --predictions spreadsheet.csv --out reports/spreadsheet \
	  && ../../$(BIN)/python from_sklearn.py \
	  && ../../$(BIN)/moe-posterior evaluate --predictions digits.parquet --shift shift --groups stroke --out reports/digits \
	  && HF_HUB_OFFLINE=1 ../../$(BIN)/python from_transformers.py \
	  && ../../$(BIN)/moe-posterior evaluate --predictions reviews.jsonl --class-names complaint praise --out reports/reviews
	@echo "== examples/language_model"
	cd examples/language_model && OMP_NUM_THREADS=1 ../../$(BIN)/moe-posterior fit --config experiment.yaml --overwrite

wheel: $(INSTALLED)  ## build a wheel, install it in a fresh environment outside the checkout and use it there (2 minutes)
	$(BIN)/python tests/wheel_check.py

test: $(INSTALLED)  ## run the test suite except tests marked slow, in WORKERS=2 processes of one thread each
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED)  ## run the tests marked slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)  ## run ruff, mypy and the import-order test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moe_posterior
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_imports.py

format: $(INSTALLED)  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; keeps runs/ and results/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
