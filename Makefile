# make bench METHOD=pqcache | make test | make lint | make paper SCALE=small | make figures | make report | make setup |
# make gpu-check | make gpu-wheels
METHOD ?= pqcache
MODEL ?= smollm2
BENCHMARK ?=
ARGS ?=
RESULTS ?= results
SCALE ?= small
PYTHON ?= python3.11

BIN := .venv/bin
comma := ,
STAMP := .venv/ready
RUN := $(BIN)/python -m pqbench $(if $(BENCHMARK),,--multirun )model=$(MODEL) method=[$(if $(filter full,$(METHOD)),full,full,$(METHOD))] results=$(RESULTS)

.PHONY: setup setup-sweep bench paper figures report tables test test-all lint gpu-check gpu-wheels

setup: $(STAMP)

# The pins are complete, so pip resolves nothing. With dependencies, the model package would install an unused inference
# engine.
$(STAMP): constraints.txt pyproject.toml
	command -v $(PYTHON) >/dev/null || { echo "pqbench needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Installs the launchers of joblib and Ray (Ray alone has 240 MB).
setup-sweep: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-sweep.txt

# Full attention beside METHOD over one shared prefill: the quick suite, or BENCHMARK alone when it is set.
bench: setup
	@$(RUN) $(if $(BENCHMARK),benchmark=$(BENCHMARK),benchmark=needle$(comma)infinitebench_quick$(comma)ruler_quick) $(ARGS)
	@$(BIN)/python -m plots $(RESULTS)

# Every table and figure of the paper that needs no external data; see docs/paper.md. The same command resumes. An
# experiment that fails does not stop the others, but makes the exit code 1.
EXPERIMENTS ?= power_law memory latency breakdown overlap cache iterations_latency needle infinitebench_1_5 \
	infinitebench_1_10 question_first token_budget communication_budget codebooks iterations ablation
paper: setup
	@failed=; for name in $(EXPERIMENTS); do \
		echo "experiment $$name"; \
		$(BIN)/python -m pqbench experiment=$$name scale=$(SCALE) results=$(RESULTS) $(ARGS) || failed="$$failed $$name"; \
	done; \
	$(BIN)/python -m plots $(RESULTS); \
	test -z "$$failed" || { echo "failed:$$failed (retry_failed=true in ARGS runs failed samples again)"; exit 1; }

figures: setup
	@$(BIN)/python -m plots $(RESULTS)

report: setup
	@$(BIN)/python -m plots.report $(RESULTS)

tables: setup
	@$(BIN)/python -m pqbench.tables $(RESULTS)

# One process per core, at most four because of memory. Each process, and each command that it starts, uses one thread.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# All tests, and then the slow ones: the kernels in Triton's interpreter and for every compile target, runs that are
# killed, a wheel in a fresh environment, and the launchers of sweeps that are installed.
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pqbench methods plots gpucheck tests

# For a machine with a GPU, with any Python that has torch; see docs/gpu.md. It needs neither `make setup` nor a
# network. `make gpu-check DEVICE=cpu SIZE=tiny` runs the same steps without a GPU.
DEVICE ?= cuda
SIZE ?= full
LIMIT ?= 525
STEPS ?=
GPU_RESULTS ?=
WHEELS ?= wheels
BARE_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
gpu-check:
	@$(BARE_PYTHON) -m gpucheck --device=$(DEVICE) --size=$(SIZE) --limit=$(LIMIT) --steps=$(STEPS) --wheels=$(WHEELS) \
		--results=$(GPU_RESULTS)

# Makes a folder with the packages that a bare image lacks, for a machine without a network.
gpu-wheels:
	@$(BARE_PYTHON) -m gpucheck.wheels $(WHEELS)
