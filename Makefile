# Two commands: `make demo` shows the whole way, `make test` runs the whole gate. Each sets everything up once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# The tests start processes of their own; without bytecode each would compile the whole stack again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test conformance format weights test-lowest clean

demo: $(STAMP)
	$(BIN)/vlm-encoders demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Every name of timm, open_clip and transformers through the contract; about 45 minutes on two cores.
conformance: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/conformance.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded tiny weights, made again from nothing (under 30 minutes on 2 cores).
weights: $(STAMP)
	$(BIN)/python -m vlm_encoders.tiny.build

# The suite on the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "vlm-encoders needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version); run make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet -r requirements.lock -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache runs
