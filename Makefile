# `make study` and `make test` need Python 3.11 or newer, make, and nothing else: everything is installed
# into .venv from requirements.lock, hash by hash, and again only when the lock or pyproject.toml changes.

# Which Python makes .venv, and what is handed on to the command: make study ARGS="--set depth=8".
PYTHON =
ARGS =

# What is installed. `make setup LOCK=cluster/requirements.lock` adds what the nodes of a cluster need, and who starts one;
# `ready` names the lock, which stays the one until another is asked for.
installed := $(wildcard $(shell cat .venv/ready 2>/dev/null))
LOCK = $(or $(installed),requirements.lock)

bin = .venv/bin
# DeepSpeed comes as source; its C++ operations are not ours to use, so nothing is compiled.
export DS_BUILD_OPS = 0
# Every worker imports torch, and where PYTHONDONTWRITEBYTECODE is set each would compile it anew: what is installed is
# compiled at set-up, half a minute, and what is ours when a command of this file first imports it.
export PYTHONDONTWRITEBYTECODE =

help:
	@echo 'make study   train the BN-only depth study, laptop preset, and report   (ARGS="--set depth=8,14")'
	@echo 'make test    run the tests, two files at a time                         (ARGS="-k store")'
	@echo 'make test-cluster  bring up a real cluster over hosts of this one machine; needs root on Linux'
	@echo 'make check   lint, format, types, and which module may import which'
	@echo 'make bench   speed against a plain PyTorch loop and the limit; norms, probes, cohorts, gangs, overhead, store, scale'
	@echo 'make lock    resolve requirements.lock anew from pyproject.toml         (ARGS="--upgrade")'
	@echo 'make setup   only install                                               (PYTHON=python3.12)'
	@echo 'make clean   remove .venv and caches; results/ stays'

study: setup
	$(bin)/python studies/frankle_depth.py $(ARGS)

test: setup
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Hosts are namespaces of this machine, joined by a network that nobody else is on; see tests/cluster/hosts.py.
test-cluster: setup
	@$(bin)/python tests/cluster/hosts.py
	$(bin)/python -m pytest tests/cluster --durations=0 $(ARGS)

check: setup
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports

bench: setup
	$(bin)/python benchmarks/step.py
	$(bin)/python benchmarks/norms.py
	$(bin)/python benchmarks/probes.py
	$(bin)/python benchmarks/overhead.py
	$(bin)/python benchmarks/limit.py
	$(bin)/python benchmarks/cohort.py
	$(bin)/python benchmarks/gang.py
	$(bin)/python benchmarks/store.py
	$(bin)/python benchmarks/scale.py

lock: setup
	$(resolve) --output-file requirements.lock $(ARGS)
	$(resolve) --extra cluster --constraints requirements.lock --output-file cluster/requirements.lock

resolve = $(bin)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-header --quiet

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

setup: .venv/ready

# A .venv without `ready` is one whose set-up was interrupted: it is made again from the start.
.venv/ready: $(LOCK) pyproject.toml $(if $(filter-out $(LOCK),$(or $(installed),requirements.lock)),other_lock)
	@test -e $@ || $(new_venv)
	@rm -f $@
	@echo 'setup: installing $(LOCK) (about 5 GB, some minutes the first time)'
	@$(bin)/uv pip sync --quiet --compile-bytecode --python $(bin)/python --require-hashes --build-constraints $(LOCK) $(LOCK)
	@$(bin)/uv pip install --quiet --python $(bin)/python --no-deps --no-build-isolation --editable .
	@echo '$(LOCK)' >$@

# uv itself comes by plain pip, at the version and the hashes that the lock gives.
define new_venv
{ \
	python=; \
	for each in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$each -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$each; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'setup: no $(or $(PYTHON),python3) of 3.11 or newer with its venv module; install one (Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; \
	    exit 1; \
	fi; \
	echo "setup: making .venv with $$($$python --version)"; \
	$$python -m venv --clear .venv && \
	awk '/^[^ #]/ { ours = /^uv==/ } ours' $(LOCK) >.venv/uv.txt && \
	$(bin)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt; \
}
endef

.PHONY: help study test test-cluster check bench lock clean setup other_lock
