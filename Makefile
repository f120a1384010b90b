# Everything a newcomer or CI runs. `make demo` and `make test` need Python 3.11+ and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow test-gpu check bench soak kernel-table clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/shoal demo

test: setup
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

# On a CUDA machine the tests of kernels and engine run on the device instead of Triton's interpreter and the CPU.
test-gpu: setup
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'make test-gpu needs a CUDA device'"
	$(BIN)/pytest tests/kernels tests/actors -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/shoal bench engine
	$(BIN)/shoal bench pipeline
	$(BIN)/shoal bench speculation
	$(BIN)/shoal bench quantize
	$(BIN)/shoal bench online --only overhead
	$(BIN)/shoal bench kernels
	$(BIN)/shoal bench nightly
	$(BIN)/shoal bench plan

# Half an hour of load, half of it ten times what this machine holds; MINUTES=4 for a short one.
MINUTES ?= 30
soak: setup
	$(BIN)/shoal bench online --only soak --minutes $(MINUTES)

# What the kernels compile to, for GPUs that need not be here; write the table anew after a change of one (some 10 min).
kernel-table: setup
	PYTHONPATH=. $(BIN)/python tests/kernels/compile_kernels.py write

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
