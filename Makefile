# The two commands: `make search` (the main job) and `make test`. Both set everything up on a fresh machine.
SPACE ?= s10
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin
TUNE := $(BIN)/python -m tune_cifar
READY := .venv/.ready

KILLS ?= 20

.PHONY: search test test-default test-faults browser lint bench bench-gpu rows docs clean

# CIFAR-10 where it can be had, else the generated stand-in: the command says so in a banner.
search: $(READY)
	@if $(TUNE) data fetch; then \
	  $(TUNE) search --space $(SPACE) $(ARGS); \
	else \
	  $(TUNE) search --space $(SPACE) --data shapes $(ARGS); \
	fi

# The default tier; what everything rests on must be fully covered by its own tests. Then what needs Ray, MLflow and a
# fresh environment: four at once, for they wait for processes half of their time.
COVERED_TESTS := tests/test_schema.py tests/space tests/record
COVERED := schema space record.events record.state record.journal
test: test-default
	$(BIN)/python -m pytest -q -n 4 --dist loadgroup -m "slow and not faults and not gpu" --durations=5

test-default: $(READY)
	$(BIN)/python -m pytest -q -n 2 $(COVERED_TESTS:%=--ignore=%)
	$(BIN)/python -m pytest -q -n 2 $(COVERED_TESTS) $(COVERED:%=--cov=tune_cifar.%) --cov-branch \
	  --cov-report=term-missing --cov-fail-under=100

# Chromium and its driver for the browser tests, where Debian's packages can be had without asking for a password.
APT := apt-get -qq -o DPkg::Lock::Timeout=120
browser:
	@if command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	if command -v apt-get >/dev/null && $$as true 2>/dev/null && $$as $(APT) update \
	  && $$as env DEBIAN_FRONTEND=noninteractive $(APT) install --no-install-recommends chromium chromium-driver >/dev/null; \
	then exit 0; fi; \
	echo "No chromedriver here, and none could be installed: the browser tests will be skipped."

# Every fault done to whole searches, KILLS of them by kill -9 at random moments; and what else takes minutes.
test-faults: $(READY)
	KILLS=$(KILLS) $(BIN)/python -m pytest -q -m "not gpu" tests/faults --durations=0
	$(BIN)/python -m pytest -q -m faults --ignore=tests/faults --durations=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios against what a user would use instead, about an hour and a half with nothing beside it.
bench: $(READY)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/augment.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/vs_stock.py
	@$(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 'Not measured, for want of a GPU:', \
	  'make bench-gpu measures what benchmarks/NOTES.md lists under What waits for a GPU.')"

# What waits for a GPU: the tests that need one, then the figures that benchmarks/NOTES.md lists as targets.
bench-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/gpu.py --space s10
	$(BIN)/python benchmarks/gpu.py --space s7 --epochs 6
	$(BIN)/python benchmarks/packing.py --space s7
	$(BIN)/python benchmarks/augment.py
	$(TUNE) search --space s10 --tier full --trials 100 --execution captured

# Days of trainings that fill README's table of systems; Ctrl-C ends it in order, and it goes on where it was.
rows: $(READY)
	$(BIN)/python benchmarks/rows.py run $(ARGS)

# What the documents take from the code: the table of knobs. A test fails while it is not up to date.
docs: $(READY)
	$(BIN)/python docs/knobs.py

# The environment: uv where it is there, pip otherwise. Bytecode is compiled now, so that no start pays for it later.
$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  test -d .venv || uv venv --quiet --python $(PYTHON) .venv; \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  test -d .venv || $(PYTHON) -m venv .venv; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@$(BIN)/python -m compileall -q tune_cifar
	@touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info
