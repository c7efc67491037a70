# Every target does its own set-up in .venv; `make install` says what it installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-long faults cluster hosts chaos soak bench workers lint

install: $(STAMP)

# Without a GPU a bare `torch` pulls gigabytes of CUDA packages, so the version that has a CPU build at hand goes first.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("caldpo_ray needs Python 3.11 or newer; set PYTHON=python3.12 or the like") if sys.version_info < (3, 11) else None'
	@echo "Installing into $(VENV): torch first, then caldpo_ray with its test tools (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet 'torch==2.13.0'
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

quickstart: install
	@echo "Quickstart: world -> supervised base -> Cal-DPO and DPO -> figure (about four minutes on two cores)"
	@$(BIN)/python examples/quickstart/run.py

# The Ray tests leave an eighth of two cores idle, waiting for processes: the others run there, and are shown when they are done.
test: install
	@echo "Tests: those on one local Ray cluster, jobs sent to others, and all the rest beside them (under half an hour on two cores)"
	@nice -n 19 $(BIN)/python -m pytest tests/unit tests/parity > .pytest-others.log 2>&1 & others=$$!; \
	trap "kill $$others" INT TERM; \
	$(BIN)/python -m pytest tests/ray -m "not long"; ray=$$?; \
	$(BIN)/python -m pytest tests/cluster -m "not long"; jobs=$$?; \
	wait $$others; code=$$?; cat .pytest-others.log; exit $$((ray | jobs | code))

# What the half hour of `make test` has no room for.
test-long: install
	@echo "Long tests: whole runs on object storage, with full memory, a hanging rank, a full disk, under ASHA (ten minutes on two cores)"
	@$(BIN)/python -m pytest tests/ray tests/cluster -m long

# `make faults FAULTS="-k head"` hands options on.
faults: install
	@echo "Faults: nodes of a cluster on this machine die, go and come; how long a run then stands still (about ten minutes on two cores)"
	@$(BIN)/python -m pytest -s tests/faults $(FAULTS)

cluster: install
	@echo "Cluster: jobs sent to local raylets under Ray's autoscaler, as the manifests in cluster/kuberay have them (five minutes)"
	@$(BIN)/python -m pytest tests/cluster

# Skipped, with the reason, where root may not make network namespaces. `make hosts HOSTS="-k cut_off"`
hosts: install
	@echo "Hosts: raylets in network namespaces, one of which is cut off in mid-run, and others that lack something (some minutes)"
	@$(BIN)/python -m pytest -s tests/hosts $(HOSTS)

# `make bench BENCH="--repetitions 1 --skip scaling rows"` hands options on.
bench: install
	@echo "Benchmark: this project and TRL on the same rows, one after the other (an hour on two cores; BENCH=\"--skip rows\": forty minutes)"
	@$(BIN)/python -m tests.benchmarks.throughput $(BENCH)

# `make workers WORKERS="--workers 128"`
workers: install
	@echo "Workers: feed and store, asked by 512 policy workers without a model (some minutes)"
	@$(BIN)/python -m tests.benchmarks.many_workers $(WORKERS)

# `make chaos CHAOS="--kills 200 --seed 1"`
chaos: install
	@echo "Chaos: seeded random kills over short runs, each compared with one that nobody disturbed (200 kills: three quarters of an hour on two cores)"
	@$(BIN)/python -m tests.chaos.kills $(CHAOS)

# `make soak SOAK="--rows 100000"`
soak: install
	@echo "Soak: a million rows through a trivial model; memory, open files and object store must stay flat"
	@$(BIN)/python -m tests.chaos.soak $(SOAK)

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
