# Two commands do everything on a fresh machine:
#   make demo    an environment, then the main job: the tiny model, on the CPU
#   make test    an environment, then the full tier of tests
# Written for GNU make 3.81 (macOS) and newer.

# PYTHON=...     the interpreter the environment is made with (3.11 or newer); found by itself
# VENV=...       where the environment lies
# PIP_FLAGS=...  more flags for pip, e.g. --extra-index-url with PyTorch's CPU wheel index (see pytorch.org)
# ARGS=...       overrides for `make demo`, or arguments of pytest for the test tiers
# WORKERS=...    test processes; 0 runs the tests in one
VENV = .venv
PIP_FLAGS =
ARGS =
WORKERS = 2

IN_VENV = $(VENV)/bin/
INSTALLED = $(VENV)/.installed
# two processes with one thread each are faster here than one process with two
PYTEST = OMP_NUM_THREADS=1 $(IN_VENV)python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help env demo test fast extended check format clean
help:
	@echo "make demo      set up, then train the tiny model on the CPU"
	@echo "make test      set up, then the full tier of tests"
	@echo "make fast      the fast tier of tests (2 minutes at most)"
	@echo "make extended  the tests that need a GPU, a download or patience"
	@echo "make check     lint, format and import floors"
	@echo "make format    let ruff mend what it can"
	@echo "make clean     remove the environment and all caches (runs/ stays)"

env: $(INSTALLED)

demo: $(INSTALLED)
	$(IN_VENV)python -m tc_lightning train $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

fast: $(INSTALLED)
	$(PYTEST) -m "not full and not extended" $(ARGS)

extended: $(INSTALLED)
	$(IN_VENV)python -m pytest -m extended $(ARGS)

check: $(INSTALLED)
	$(IN_VENV)ruff check .
	$(IN_VENV)ruff format --check .
	$(IN_VENV)lint-imports

format: $(INSTALLED)
	$(IN_VENV)ruff check --fix .
	$(IN_VENV)ruff format .

# The stamp is written last: an installation that broke off is taken up again.
$(INSTALLED): requirements.txt setup.cfg pyproject.toml
	@python=""; \
	for candidate in $(if $(PYTHON),$(PYTHON),python3 python3.12 python3.11 python3.13 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "tc_lightning needs Python 3.11 or newer and found none: install it, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "$$python cannot make environments. On Debian and Ubuntu: apt install python3-venv, then again" >&2; \
	  exit 1; \
	fi; \
	echo "$$python -m venv $(VENV)"; \
	"$$python" -m venv $(VENV)
	$(IN_VENV)python -m pip install $(PIP_FLAGS) -r requirements.txt
	$(IN_VENV)python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) build dist tc_lightning.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find tc_lightning conf tests -name __pycache__ -type d -prune -exec rm -rf {} +
