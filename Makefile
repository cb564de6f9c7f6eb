# make demo   see fastres work on this machine
# make test   everything that needs no GPU
# make lint   ruff and mypy
# make docs   the documentation site, into build/site
# make gpu    validate, tune and measure on this machine's GPU; PYTHON=python3 uses that interpreter and no network
#
# Each sets up .venv by itself, with the versions of constraints.txt.

BASE_PYTHON ?= python3
VENV := .venv
# make gpu: stop after BUDGET seconds (run it again to go on); also copy results to the folder OUT
BUDGET ?=
OUT ?=

# With PYTHON given, that interpreter is used as it is: nothing is installed but fastres itself, without dependencies.
ifdef PYTHON
READY := installed
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test lint docs gpu clean installed

demo: $(READY)
	$(PYTHON) -m fastres demo

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -q -m "not gpu"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -q

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict -f docs/mkdocs/mkdocs.yml
	@echo "Open build/site/index.html (its search needs a server: python3 -m http.server -d build/site)"

gpu: $(READY)
	$(PYTHON) -m bench.gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--copy $(OUT))

# torch and torchvision first and alone: the same pin is a CPU build on one machine and a CUDA build on another, and
# torchvision's dependency on torch must not swap it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit("fastres needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip -c constraints.txt
	$(VENV)/bin/python -m pip install -q torch -c constraints.txt
	$(VENV)/bin/python -m pip install -q setuptools wheel -c constraints.txt
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[dev]' -c constraints.txt
	$(VENV)/bin/python -m pip install -q --no-deps torchvision -c constraints.txt
	touch $@

installed:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .

clean:
	rm -rf $(VENV) build dist out *.egg-info
