# The two commands: `make search` (the main job) and `make test`. Both first install everything.
SPACE ?= s10
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin
TUNE := $(BIN)/python -m tune_cifar
READY := .venv/.ready

KILLS ?= 20

.PHONY: search test test-default test-faults browser services lint bench bench-gpu session-dry rows \
  docs clean

# On CIFAR-10 where `data verify` finds it, else fetched; on synthetic data if that cannot be done: the
# command prints a banner then.
search: $(READY)
	@if $(TUNE) data verify >/dev/null 2>&1 || $(TUNE) data fetch; then \
	  $(TUNE) search --space $(SPACE) $(ARGS); \
	else \
	  $(TUNE) search --space $(SPACE) --data shapes $(ARGS); \
	fi

# The default tier, then the slow one (Ray, MLflow, a fresh environment): three at once, since these
# tests wait for processes part of their time. The tests of COVERED must cover it completely. Compiled
# tests are kept even where Python is told not to: each process compiles them otherwise, 5 s long.
COVERED_TESTS := tests/test_schema.py tests/space tests/record
COVERED := schema space record.events record.state record.journal
test test-default test-faults: export PYTHONDONTWRITEBYTECODE=
test: test-default
	$(BIN)/python -m pytest -q -n 3 --dist loadgroup -m "slow and not faults and not gpu" --durations=5

test-default: $(READY)
	$(BIN)/python -m pytest -q -n 2 $(COVERED_TESTS:%=--ignore=%)
	$(BIN)/python -m pytest -q -n 2 $(COVERED_TESTS) $(COVERED:%=--cov=tune_cifar.%) --cov-branch \
	  --cov-report=term-missing --cov-fail-under=100

# Chromium and its driver for the browser tests.
browser:
	@command -v chromedriver >/dev/null || \
	  tools/apt.sh "the browser tests will be skipped." chromium chromium-driver

# PostgreSQL, and the drivers for it, S3 and Google's store, for the tests of a tracking server and of
# a mirror.
services: $(READY)
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	  tools/apt.sh "the tests of a tracking server will be skipped." postgresql
	@if command -v uv >/dev/null 2>&1; then pip="uv pip install --python $(BIN)/python"; \
	else pip="$(BIN)/python -m pip install --disable-pip-version-check"; fi; \
	$$pip --quiet -c constraints.txt -e '.[dev,s3,gcs,postgres]' gcp-storage-emulator || \
	  echo "no drivers for PostgreSQL and object stores: their tests will be skipped."

# Every fault injected into complete searches, KILLS times kill -9; and all else that takes minutes.
test-faults: $(READY)
	KILLS=$(KILLS) $(BIN)/python -m pytest -q -m "not gpu" tests/faults --durations=0
	$(BIN)/python -m pytest -q -m faults --ignore=tests/faults --durations=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios against the usual alternatives; about 90 minutes on an idle machine.
bench: $(READY)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/augment.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/vs_stock.py
	@$(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 'No GPU here:', \
	  'make bench-gpu measures on one. benchmarks/session.py measures what is still open there.')"

# On a GPU: the tests that need one, then the benchmarks of it. What is still open, as benchmarks/NOTES.md
# lists it under "What waits for a GPU", is benchmarks/session.py's: three parts of four minutes.
bench-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/gpu.py --space s10
	$(BIN)/python benchmarks/gpu.py --space s7 --epochs 6
	$(BIN)/python benchmarks/packing.py --space s7
	$(BIN)/python benchmarks/augment.py
	$(TUNE) search --space s10 --tier full --trials 100 --execution captured

# What a session on a GPU runs, at a tiny size on a CPU: no typo is met there for the first time. The
# parts run at once.
session-dry: $(READY)
	printf '%s --dry\n' 3 1 2 | OMP_NUM_THREADS=1 xargs -L 1 -P 3 $(BIN)/python benchmarks/session.py

# Days of trainings for the table of docs/method.md; stop it with Ctrl-C, start it to resume.
rows: $(READY)
	$(BIN)/python benchmarks/rows.py run $(ARGS)

# Write the table of knobs into search_spaces/README.md; a test fails while it is out of date.
docs: $(READY)
	$(BIN)/python tools/knobs.py

# The environment, by uv if installed, else by pip. Compiling bytecode now makes later starts fast.
INSTALL := -c constraints.txt -e '.[dev]'
$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  test -d .venv || uv venv --quiet --python $(PYTHON) .venv; \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python $(INSTALL); \
	else \
	  test -d .venv || $(PYTHON) -m venv .venv; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(INSTALL); \
	fi
	@$(BIN)/python -m compileall -q tune_cifar
	@touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info
