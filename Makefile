# make demo    the main job: the same requests through a contiguous KV cache and through a paged one
# make test    all tests that need no GPU
# Both make .venv on first use and install exactly what constraints.txt says.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-slow lint docs benchmarks-smoke constraints clean

demo: .venv/demo
	$(BIN)/paged demo --plot paged-demo.png

# A worker for each core, each with one thread of its own.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" -ra --durations=10

test-slow: .venv/test
	$(BIN)/python -m pytest -ra -m slow

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: built without warnings, open docs/_build/html/index.html"

# That every benchmark runs, on tiny shapes on the CPU; the figures mean nothing.
benchmarks-smoke: .venv/test
	for name in attention "attention --prefill" flex_options products "decode_step --profile" shared_prefix \
			"mixed_step --profile" "throughput --profile-steps 3" "throughput --samples" sweeps \
			"sweeps --only block-size" start_up judged_kernels; do \
		set -- $$name; script=$$1; shift; \
		$(BIN)/python benchmarks/$$script.py --smoke --device cpu "$$@" || exit 1; \
	done
	$(BIN)/python benchmarks/report.py --results build/benchmarks

# A stamp for each extra, so that `make demo` does not wait for the linters.
.venv/demo: EXTRA :=
.venv/test: EXTRA := [test]
.venv/lint: EXTRA := [lint]
.venv/docs: EXTRA := [docs]
.venv/demo .venv/test .venv/lint .venv/docs: .venv/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRA)'
	@touch $@

.venv/python:
	@test -n "$(PYTHON)" || { echo "make: no Python found; install Python 3.11 or newer, or say make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1) and paged needs 3.11 or newer; say make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@

# Resolve everything anew and pin it; the one number that is chosen by hand is torch's.
constraints:
	rm -rf build/constraints
	"$(PYTHON)" -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	build/constraints/bin/python -m pip install --quiet torch==2.13.0 -e '.[test,lint,docs]' hatchling
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf .venv build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis paged-demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
