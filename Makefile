# `make demo`, `make test`, `make lab`, `make check`, `make docs`: each creates the environment in .venv when it is missing or stale.
# Another interpreter: `make test PYTHON=python3.12`. It must be Python 3.11 or newer.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lab check docs

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lab: $(READY)
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

check: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

# The site, into `site/`: warnings are errors, and building asks no other host for anything once its packages are there.
docs: $(READY)
	@$(BIN)/python -c 'import myst_nb' 2>/dev/null || \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs site
	@echo "site/index.html: open it in a browser"

$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "lmc needs Python 3.11 or newer and found none; name one: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "Creating the environment in $(VENV) (a minute or two the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
