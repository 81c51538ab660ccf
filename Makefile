# Two commands: `make pretrain` and `make test`. Both make the environment first.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
RANKS ?= 2
KILLS ?= 100
DEMO ?= demo
# The keys of generated subjects are no secret; a fixed salt gives everyone the same split. Real data want a random one.
SALT := 5d41402abc4b2a76b9719d911017c592

.PHONY: pretrain test test-slurm test-soak environment lint types tests clean

pretrain: environment
	$(BIN)/swiftv2 store synth $(DEMO)/bids --config configs/synth/demo.yaml
	$(BIN)/swiftv2 store build $(DEMO)/bids $(DEMO)/cohort.zarr --cohort generated --salt $(SALT) grid.voxel_mm=4
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) \
		-m swiftv2 pretrain configs/pretrain/demo.yaml data.store=$(DEMO)/cohort.zarr run.dir=$(DEMO)/run

test: environment lint types tests

environment: $(VENV)/.complete

$(VENV)/.complete: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed and neither was found; say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

tests:
	$(BIN)/python -m pytest -m "not alone" -n $(RANKS) --dist loadfile
	$(BIN)/python -m pytest -m alone --ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm -n $(RANKS) --dist loadfile

test-slurm: environment
	$(BIN)/python -m pytest tests/slurm

test-soak: environment
	$(BIN)/python benchmarks/soak.py --folder $(DEMO)/soak --kills $(KILLS) --out benchmarks/results/$$(date -u +%F)-soak.md

clean:
	rm -rf $(VENV) $(DEMO)
