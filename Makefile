# Every command of the project, with nothing assumed but GNU make, a POSIX shell and Python 3.11
# or newer. Packages go into .venv, at the versions of constraints.txt, and are installed again
# only when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
PLATFORM ?= cpu
TEST_WORKERS ?= 2
VENV := .venv

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help experiment report test test-all lint format docs build bench lock clean distclean

# ------------------------------------------------------------------------------ variables

OPTIONS := PRESET DATASET DATA_DIR LEVELS PREPROCESS METHOD STEPS SEARCH POSTERIOR DAMPING SOLVER GRADIENT \
    CURVATURE NETWORK CHANNELS LATENT HIDDEN ACTIVATION LIKELIHOOD VARIANCE PRECISION OBJECTIVE \
    TRAIN_SAMPLES EPOCHS PRETRAIN MODES PATIENCE MINUTES BATCH_SIZE MICROBATCHES LEARNING_RATE SEED \
    IMPORTANCE_SAMPLES PROPOSAL TEST_IMAGES CHUNK_SIZE RUN_DIR RUNS_DIR
DISTRIBUTED := DEVICES COORDINATOR PROCESSES PROCESS_ID
SWITCHES := RESUME RESUME_IF_THERE OVERWRITE STREAM TENSORBOARD SHARD_PARAMETERS
OTHERS := PLATFORM ARGS PYTHON VENV TEST_WORKERS JAX_PLATFORMS

# A misspelt name must not become an experiment with the default in its place.
TYPED := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v)))
UNKNOWN := $(firstword $(filter-out $(OPTIONS) $(DISTRIBUTED) $(SWITCHES) $(OTHERS) -% MAKE%,$(TYPED)))
ifneq ($(UNKNOWN),)
  $(error Unknown variable $(UNKNOWN). Known: $(OPTIONS) $(DISTRIBUTED) $(SWITCHES) $(OTHERS))
endif

# The data set that a preset stands for.
ifeq ($(PRESET)$(DATASET),paper-screenshot)
  DATASET := mnist
endif

ifneq ($(filter experiment,$(MAKECMDGOALS)),)
  ifneq ($(words $(PLATFORM))$(filter cpu cuda tpu,$(PLATFORM)),1$(PLATFORM))
    $(error PLATFORM=$(PLATFORM) is not one of cpu, cuda, tpu)
  endif
  $(foreach v,$(SWITCHES),$(if $(filter-out 0 1,$($(v))),$(error $(v)=$($(v)) is neither 1 (on) nor 0)))
endif

# Values reach the shell as they were typed, between single quotes.
comma := ,
quote = '$(subst ','\'',$(1))'
option = $(if $(value $(1)), $(call flag,$(1)) $(call quote,$(value $(1))))

# LEARNING_RATE becomes --learning-rate, DEVICES --distributed.devices. HIDDEN and CHANNELS take
# several words, each quoted by itself; a switch takes none.
NAMES := $(OPTIONS) $(DISTRIBUTED) $(SWITCHES)
LISTS := HIDDEN CHANNELS
KEBAB := $(join $(addsuffix :,$(NAMES)),$(shell echo '$(NAMES)' | tr 'A-Z_' 'a-z-'))
prefix = $(if $(filter $(1),$(DISTRIBUTED) SHARD_PARAMETERS),distributed.)
flag = --$(prefix)$(patsubst $(1):%,%,$(filter $(1):%,$(KEBAB)))
typed = $(if $(filter $(1),$(LISTS)),$(foreach word,$(value $(1)),$(call quote,$(word))),$\
    $(call quote,$(value $(1))))
argument = $(call flag,$(1))$(if $(filter-out $(SWITCHES),$(1)), $(call typed,$(1)))
GIVEN = $(strip $(foreach v,$(NAMES),$(if $(filter $(v),$(SWITCHES)),$\
    $(if $(filter 1,$($(v))),$(v)),$(if $(value $(v)),$(v)))))

DATA_OPTION = $(call option,DATA_DIR)
STREAM_OPTION = $(if $(filter 1,$(STREAM)), --stream)
TRAIN_OPTIONS = $(if $(GIVEN), $(foreach v,$(GIVEN),$(call argument,$(v))))$(if $(ARGS), $(ARGS))

# With cuda or tpu named first, JAX stops when there is none instead of training on the CPU.
JAX_PLATFORMS ?= $(if $(filter cpu,$(PLATFORM)),cpu,$(PLATFORM)$(comma)cpu)

# --------------------------------------------------------------------------- installation

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("vlae_jax needs Python 3.11 or newer, \
	but $(PYTHON) is %d.%d; name another one: make PYTHON=..." % v[:2] if v < (3, 11) else 0)'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# .with-NAME stands for: the extra NAME of pyproject.toml is installed.
$(VENV)/.with-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing vlae_jax[$*] into $(VENV); the first time this takes minutes"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e '.[$*]'
	@touch $@

# ------------------------------------------------------------------------------- commands

help: ## Show this text
	@echo "Usage: make TARGET [NAME=value ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s%s\n", $$1, $$2 }' Makefile
	@echo
	@echo "make experiment takes, each as --name of 'vlae_jax train', whose --help explains them:"
	@echo "  $(OPTIONS)" | fold -s -w 88 | sed 's/^ */  /'
	@echo "and as --distributed.name: $(DISTRIBUTED)"
	@echo "=1 turns on: $(SWITCHES)"
	@echo "PLATFORM=cpu|cuda|tpu chooses what JAX runs on. ARGS=\"...\" goes to the command as it is."
	@echo "PYTHON=python3.12 makes .venv with that Python (make distclean removes the old one)."

# Under another name, so that `make -n` prints the lines that use it instead of running them.
SUBMAKE = $(MAKE) --no-print-directory

experiment: $(VENV)/.with-train
experiment: $(if $(filter cuda tpu,$(PLATFORM)),$(VENV)/.with-$(PLATFORM))
experiment: $(if $(filter 1,$(TENSORBOARD)),$(VENV)/.with-tensorboard)
experiment: $(if $(filter 1,$(STREAM)),$(VENV)/.with-stream)
experiment: ## Train a model and evaluate it: make experiment DATASET=mnist STEPS=4
ifneq ($(filter-out digits,$(DATASET)),)
	@# Exit code 4: the data must be downloaded, which takes TensorFlow. 3: they are here, but
	@# reading them takes tensorflow-datasets. Anything else is a mistake, already explained.
	@code=0; \
	$(VENV)/bin/vlae_jax prepare --check $(call quote,$(value DATASET))$(DATA_OPTION)$(STREAM_OPTION) || code=$$?; \
	case $$code in \
	0) ;; \
	4) $(SUBMAKE) $(VENV)/.with-prepare && \
	   $(VENV)/bin/vlae_jax prepare $(call quote,$(value DATASET))$(STREAM_OPTION) ;; \
	3) $(SUBMAKE) $(VENV)/.with-tfds ;; \
	*) exit $$code ;; \
	esac
endif
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(VENV)/bin/vlae_jax train$(TRAIN_OPTIONS)

# No persistent compilation cache: with jaxlib 0.9.2 a process on two cores was seen to hang while
# reading a program from it.
test: $(VENV)/.with-test ## Run the quick tests: make test ARGS="-k elbo"
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.with-test ## Run all tests, slow ones too
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.with-train $(VENV)/.with-lint ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck cloud/*.sh .ci/run

format: $(VENV)/.with-lint ## Format the code and repair what ruff can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/.with-docs ## Build the documentation: docs/_build/html/index.html
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet $(ARGS) docs docs/_build/html
	@echo "docs/_build/html/index.html"

build: $(VENV)/.with-lint ## Build the wheel and the source distribution into dist/
	$(VENV)/bin/python -m build $(ARGS)

report: $(VENV)/.with-train ## Set the studies' tables and draw their plots again
	$(VENV)/bin/python -m experiments.report

bench: benchmarks/run.py $(VENV)/.with-train ## Time what is worth timing
	$(VENV)/bin/python -m benchmarks.run $(ARGS)

# The newest releases that jax 0.9.2 allows: see the comment on jaxlib 0.10 in pyproject.toml.
lock: ## Resolve constraints.txt and requirements.txt again, with uv; ARGS=--upgrade moves on
	@command -v uv > /dev/null || { echo "make lock needs uv on the PATH" >&2; exit 1; }
	echo 'jax==0.9.2' | uv pip compile $(LOCKING) --all-extras pyproject.toml - \
	    --output-file constraints.txt $(ARGS)
	uv pip compile $(LOCKING) --extra train --generate-hashes -c constraints.txt pyproject.toml \
	    --output-file requirements.txt

LOCKING := --quiet --universal --python-version 3.11 --no-annotate --no-header \
    --no-emit-index-url --no-emit-find-links --no-emit-package vlae-jax

clean: ## Remove build products and caches; runs and data stay
	rm -rf build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path './$(VENV)' -o -path ./.git -o -path ./runs \) -prune \
	    -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)
