# make install | demo | wheel | test | torture | fuzz | proof | parity | compat | lint | clean
#
# PYTHON=python3.12 chooses another interpreter, TORCH=torch==2.9.1 another torch. PyPI's torch serves NVIDIA GPUs as
# well as CPUs; where only the CPU build is wanted (it is much smaller), TORCH may carry pip's options for getting it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
VENV := .venv

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help install wheel test torture fuzz proof parity compat lint demo demo-tokens clean FORCE

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip install -qq
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

help:
	@echo "make install   .venv with torch, the package and its compiled ops"
	@echo "make demo      fine-tune a real model on 4 processes and compare its replies; no GPU needed"
	@echo "make demo-tokens   fine-tune a real encoder to find names in sentences; F1 on held-out ones, no GPU needed"
	@echo "make wheel     a wheel in dist/, named by the torch that its compiled ops are for; with CUDA kernels where nvcc is"
	@echo "make test      the whole CPU test suite; PYTEST_ARGS='-k packing' for a part of it"
	@echo "make torture   kill a run 50 times at random moments; every resume must be exact (KILLS=50 SEED=0)"
	@echo "make fuzz      files and requests made up at random, EXAMPLES=100000 for each reader: only our own errors (hours)"
	@echo "make proof     every schedule up to 16 stages, 4 chunks, 64 microbatches; the whole grid of layouts (many minutes)"
	@echo "make parity    greedy replies against transformers and peft: 20 prompts, each family and a real model"
	@echo "make compat    tokenizers as read by each version of transformers in VERSIONS, in environments of their own"
	@echo "make lint      ruff, mypy, and clang-format where it is installed"
	@echo "make clean     remove what was built; the environment and the demo's model stay"

# ---- install: two stamps inside .venv, so that a repeated call does nothing ----

TORCH_STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
PACKAGE_STAMP := $(VENV)/.installed-megalora
# The compiled ops lie in the source tree; where they were cleaned away they are built again.
OPS := $(if $(filter 0,$(MEGALORA_BUILD_EXTENSION)),,$(if $(wildcard megalora/_C*.so),,FORCE))

install: $(PACKAGE_STAMP)

# One clear line where the machine lacks what an installation needs.
define CHECK_MACHINE
fail() { echo "make install: $$1" >&2; exit 1; }; \
command -v '$(PYTHON)' >/dev/null || fail 'no $(PYTHON) here: install Python 3.10 or newer'; \
'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| fail "$$('$(PYTHON)' --version 2>&1) is too old: make PYTHON=... with Python 3.10 or newer"; \
'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null \
	|| fail 'this Python cannot make environments: install its venv module (Debian: python3-venv)'; \
if [ '$(MEGALORA_BUILD_EXTENSION)' != 0 ]; then \
	command -v "$${CXX:-c++}" >/dev/null \
		|| fail "no C++ compiler ($${CXX:-c++}): install one (Debian: g++), set CXX, or go without the faster compiled ops: MEGALORA_BUILD_EXTENSION=0 make install"; \
	'$(PYTHON)' -c 'import os, sysconfig as s; os.stat(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null \
		|| fail 'the C headers of this Python are missing: install them (Debian: python3-dev)'; \
fi
endef

$(TORCH_STAMP):
	@$(CHECK_MACHINE)
	@echo "== environment in $(VENV), $(TORCH) (the one large download)"
	@'$(PYTHON)' -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@$(PIP) $(TORCH)
	@touch $@

$(PACKAGE_STAMP): $(TORCH_STAMP) setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*) $(OPS)
	@$(CHECK_MACHINE)
	@echo "== megalora, its requirements and its compiled ops"
	@$(PIP) 'setuptools>=68' wheel pybind11 ninja
	@$(RUN) $(PIP) --no-build-isolation --editable '.[demo,test]'
	@touch $@
	@$(VENV)/bin/python -c 'import megalora, torch; \
		print(f"== installed: megalora {megalora.__version__}, torch {torch.__version__}, GPUs: {torch.cuda.device_count()}")'
	@echo "== its commands: source $(VENV)/bin/activate && megalora --help"
	@echo "== next: make demo"

# ---- use ----

demo: install
	@$(RUN) examples/demo.sh

demo-tokens: install
	@$(RUN) examples/demo_tokens.sh

wheel: install
	@$(RUN) MEGALORA_WHEEL=1 $(VENV)/bin/python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

test: install
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist worksteal -q $(PYTEST_ARGS)

torture: install
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -q -s tests/test_torture.py --kills $(or $(KILLS),50) --seed $(or $(SEED),0)

fuzz: install
	@$(RUN) OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(or $(EXAMPLES),100000) python -m pytest -q -n $(JOBS) --dist worksteal \
		-k "any or match_as_pefts" $(shell grep -rl "fuzz import.*examples" tests --include=test_*.py)

proof: install
	@$(RUN) MEGALORA_PROOF=all python -m pytest -n $(JOBS) --dist worksteal -q tests/pipeline/test_schedule.py \
		tests/test_layouts.py \
		'tests/test_modern.py::test_every_layout_gives_the_numbers_of_one_process' \
		'tests/test_classic.py::test_every_layout_gives_the_numbers_of_one_process' \
		'tests/tasks/test_classes.py::test_layouts_of_four_processes' \
		'tests/tasks/test_seq2seq.py::test_layouts_of_four_processes' \
		'tests/tasks/test_images.py::test_layouts_of_four_processes' \
		'tests/test_experts.py::test_every_layout_gives_the_numbers_of_one_process' \
		'tests/test_experts.py::test_eight_tensor_parallel_ranks'

parity: install
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -q tests/test_generation_parity.py --questions 20

# Each has transformers and what it requires; all else, torch too, is found in .venv.
VERSIONS ?= 4.51.3 4.57.1 5.0.0 5.3.0 5.8.0 5.10.0 5.15.1 5.17.0

compat: install
	@set -e; shared=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	for version in $(VERSIONS); do \
		one=.compat/$$version; \
		if [ ! -e $$one/.complete ]; then \
			$(VENV)/bin/python -m venv --clear --without-pip $$one; \
			$(VENV)/bin/python -m pip --python $$one/bin/python install -qq "transformers==$$version" sentencepiece; \
			echo "$$shared" > $$($$one/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth; \
			touch $$one/.complete; \
		fi; \
		echo "== transformers $$version"; \
		PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $$one/bin/python -m pytest -q -p no:cacheprovider tests/data/test_tokenizer.py; \
	done

lint: install
	@$(RUN) ruff check .
	@$(RUN) mypy
	@if $(RUN) command -v clang-format >/dev/null; then \
		$(RUN) clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*/*; \
	else echo 'make lint: no clang-format here (pip install clang-format): csrc/ is not looked at'; fi

clean:
	rm -rf build dist *.egg-info megalora/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megalora tests tools examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
