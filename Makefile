# make demo   run a short demonstration on this machine
# make test   run every test that needs no GPU
# make test-smaller   run the CPU's numerics again, as on a processor with AVX2 only, if this one has AVX-512
# make lint   run ruff and mypy
# make docs   build the documentation site into build/site
# make release   build the files of a release (REPOSITORY=https://…), and check them
# make gpu    test and measure on this machine's GPU: VISIT=first, tune, peers, suites or all. PYTHON=python3 uses that
#             interpreter, without a network
# make gpu-home   put the results of a visit (ARCHIVE=out/gpu/gpu.tgz) into the repository
#
# Each target sets up .venv with the versions of constraints.txt if it is missing.

BASE_PYTHON ?= python3
VENV := .venv
# make gpu: the visit, its seconds, and the folder for the archive
VISIT ?= first
BUDGET ?=
OUT ?=
ARCHIVE ?= out/gpu/gpu.tgz

# If PYTHON is given, that interpreter is used as it is. Only fastres itself is installed, without dependencies.
ifdef PYTHON
READY := installed
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Triton reads TRITON_INTERPRET when it is imported, so the tests that use its interpreter are a separate run.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal -q -p tests.progress -o console_output_style=classic
INTERPRETED := $(shell grep -rl --include='test_*.py' 'mark\.interpreter' tests)
NUMERICS := $(addprefix tests/,executors/test_cpu.py executors/test_cpu_int8.py executors/test_direct.py \
	executors/test_layouts.py onednn quantisation calibration \
	$(addprefix model/test_,model.py backbone.py headless.py predict.py quantized.py) \
	look/test_figures.py weights/test_timm_config.py \
	weights/test_transformers_config.py export classification/test_classify.py \
	bench/measure/test_checking.py bench/engines)

.PHONY: demo test test-smaller lint docs release gpu gpu-home clean installed

demo: $(READY)
	$(PYTHON) -m fastres demo

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) $(PYTEST) -m "not gpu"
	@echo "Running the kernels in Triton's interpreter"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) $(PYTEST) $(INTERPRETED)

test-smaller: $(READY)
	@if $(PYTHON) -c "from fastres.executors.processor import instruction_sets; exit('AVX-512' not in instruction_sets())"; then \
		echo "Running the CPU's numerics as on a processor with AVX2 only" && \
		OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTHON) $(PYTEST) $(NUMERICS); \
	else echo "Skipped: this processor has no AVX-512, so make test covers its numerics"; fi

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict -f docs/mkdocs/mkdocs.yml
	@echo "Open build/site/index.html"

release: $(READY)
	$(PYTHON) docs/mkdocs/release.py "$(REPOSITORY)" dist

gpu: $(READY)
	$(PYTHON) -m bench.gpu $(VISIT) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(OUT))

gpu-home: $(READY)
	$(PYTHON) -m bench.visit.home $(ARCHIVE)

# pip compiles bytecode on one core, so compileall does it later on all cores. Some packages contain files for other
# interpreters, which do not compile.
# torch is installed first and alone, torchvision last, without dependencies. The same pin is a CPU build on one machine
# and a CUDA build on another, and torchvision's dependency on torch must not replace it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit("fastres needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip -c constraints.txt
	$(VENV)/bin/python -m pip install --no-compile -q torch -c constraints.txt
	$(VENV)/bin/python -m pip install --no-compile -q setuptools wheel -c constraints.txt
	$(VENV)/bin/python -m pip install --no-compile -q --no-build-isolation -e '.[dev]' -c constraints.txt
	$(VENV)/bin/python -m pip install --no-compile -q --no-deps torchvision -c constraints.txt
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

installed:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .

clean:
	rm -rf $(VENV) build dist out *.egg-info
