# Needs python3 (3.11 or newer, with venv), git and make; everything else goes into .venv.
#
#   make demo        fine-tune a real pretrained model; ARGS="--compare" passes options on
#   make test        lint, types, the built wheel, and on each backend the suite and KerasHub's backbones
#   make test-jax    the suite on one backend; ARGS="tests/layers -k dense" passes options on
#   make test-compatibility   every KerasHub backbone on JAX, a sample on the others
#   make test-versions   other versions of Keras and Python, in environments of their own
#   make lint        ruff, mypy and import rules
#   make bench       measure against every peer; ARGS="--suite quick" for little of each
#   make coverage    the suite on each backend, with one combined report

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BACKENDS ?= tensorflow jax torch
WORKERS ?= 2
ARGS ?=

STAMP := $(VENV)/.installed
EXTRAS := examples,tensorflow,jax,torch,peft,dev

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: setup demo test test-compatibility compatibility-table test-versions lint wheel bench coverage clean $(BACKENDS:%=test-%)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/finetune_text_classifier.py $(ARGS)

# Each part runs whatever the others found; the exit code is that of the worst. A backend's suite and
# its KerasHub backbones, which `test-BACKEND` leaves out, are one run: it is started once.
test: $(STAMP)
	@failed=""; \
	for part in lint wheel $(BACKENDS:%=test-%); do \
	    echo "== $$part"; \
	    $(MAKE) --no-print-directory $$part ARGS='-m ""' || failed="$$failed $$part"; \
	done; \
	if [ -n "$$failed" ]; then echo "FAILED:$$failed"; exit 1; fi; \
	echo "All parts passed: lint, wheel, $(BACKENDS), each with KerasHub's backbones"

$(BACKENDS:%=test-%): test-%: $(STAMP)
	KERAS_BACKEND=$* $(BIN)/python -m pytest -q -n $(WORKERS) \
	    --dist worksteal $(ARGS)

test-compatibility: $(STAMP)
	@failed=""; \
	for backend in $(BACKENDS); do \
	    echo "== compatibility on $$backend"; \
	    KERAS_BACKEND=$$backend $(BIN)/python -m pytest -q -n $(WORKERS) \
	        --dist worksteal -m compatibility tests/compatibility tests/registry $(ARGS) || failed="$$failed $$backend"; \
	done; \
	if [ -n "$$failed" ]; then echo "FAILED: compatibility on$$failed"; exit 1; fi

# docs/compatibility.md anew: all classes on every backend, class by class. ARGS="--missing" goes on.
compatibility-table: $(STAMP)
	for backend in $(BACKENDS); do \
	    KERAS_BACKEND=$$backend $(BIN)/python \
	        tools/compatibility_table.py $(ARGS) || exit 1; \
	done

# docs/versions.md anew. ARGS="-s keras-nightly" makes one environment, ARGS=-l lists them.
test-versions: $(STAMP)
	WORKERS=$(WORKERS) $(BIN)/nox $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(STAMP)
	$(BIN)/python tools/check_wheel.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

coverage: $(STAMP)
	$(BIN)/coverage erase
	for backend in $(BACKENDS); do \
	    KERAS_BACKEND=$$backend $(BIN)/python -m pytest -q -n $(WORKERS) --cov --cov-append --cov-report= $(ARGS) || exit 1; \
	done
	$(BIN)/coverage report --show-missing

clean:
	rm -rf $(VENV) build dist *.egg-info outputs .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
