# `make demo` and `make test` set up everything they need in $(VENV).  Needs git, make, gcc, python3 (>= 3.11) with venv and headers.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py $(shell find csrc vfiodma -name '*.[ch]' -o -name '*.pyx' -o -name '*.pxd')
STUBS := $(shell find vfiodma/_core -name '*.pyi' ! -name '__init__.pyi')

# Kernels of `make lab`, as tests/lab/run_guests.py takes them; none: those that are there.
LAB_KERNELS ?=
LAB_ARGS ?=
export LAB ?=

.PHONY: all build demo test test-beside test-c test-deep lab lab-short lab-prepare fuzz lint types imports sanitize bench dist clean
all: build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed in place, so that Python files need no second install.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Building vfiodma and installing it into $(VENV): a minute or three"
	$(PIP) install -q -e '.[cli,plot,test]'
	@touch $@ $(VENV)/.built

# After the install only what changed is compiled again.
$(VENV)/.built: $(SOURCES) | $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'], sep='\n')" >$(VENV)/dev.txt
	$(PIP) install -q -r $(VENV)/dev.txt
	@touch $@

build: $(VENV)/.installed $(VENV)/.built

demo: build
	$(BIN)/vfiodma demo $(DEMO)

# All of it, or with PYTEST="..." a part of the Python tests.  Two halves side by side: each takes about one CPU.
test: build test-c
ifdef PYTEST
	$(BIN)/python -m pytest $(PYTEST)
else
	@mkdir -p build; $(MAKE) --no-print-directory test-beside >build/test-beside.log 2>&1 & beside=$$!; \
	trap "kill $$beside 2>/dev/null" EXIT INT TERM; \
	$(BIN)/python -m pytest --ignore=tests/conformance --ignore=tests/lab/test_differential.py; tests=$$?; \
	echo "Beside that: a kernel of the lab, and answers that kernels gave"; wait $$beside; others=$$?; trap - EXIT; \
	cat build/test-beside.log; exit $$((tests | others))
endif

test-beside: lab-short
	@$(BIN)/python -m pytest -q tests/conformance

test-c:
	$(MAKE) --no-print-directory -C tests/c check

# The longer profile: state machines of 100,000 steps each, a thousand kills of each side, lines cut at every byte.
test-deep: build
	VFIODMA_PROFILE=deep $(BIN)/python -m pytest --timeout=0 tests/property tests/stateful tests/conformance tests/faults $(PYTEST)

# Tests on real kernels in QEMU, see docs/kernel-lab.md: on one kernel a few, on each kernel all; and what they need.
lab-short: build
	@$(BIN)/python tests/lab/run_guests.py --short
	@$(BIN)/python -m pytest -q -rs -k 6.12 tests/lab/test_differential.py

lab: build
	$(BIN)/python tests/lab/run_guests.py $(LAB_ARGS) $(LAB_KERNELS) $(if $(PYTEST),-- $(PYTEST))
	$(if $(PYTEST)$(LAB_KERNELS),,$(BIN)/python -m pytest -rs tests/lab/test_differential.py)

# Random scripts played by a real kernel and by the model; FUZZ="--kernel 7.2 --sequences 500 --seed 3".
fuzz: build
	$(BIN)/python -m tests.fuzz $(FUZZ)

lab-prepare:
	$(PYTHON) tests/lab/run_guests.py --prepare $(LAB_ARGS) $(LAB_KERNELS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint vfiodma

types: build $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --concise --mypy-config-file pyproject.toml --allowlist tools/stubtest-allowlist.txt \
	  --ignore-unused-allowlist --ignore-missing-stub --ignore-disjoint-bases $(subst /,.,$(STUBS:.pyi=))

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo

# C unit tests and a short property run under ASan + UBSan, the threaded C tests under TSan.
sanitize: build
	$(MAKE) --no-print-directory -C tests/c MODE=asan check
	$(MAKE) --no-print-directory -C tests/c MODE=tsan check
	tools/sanitize.sh $(BIN)/python

bench: build
	$(BIN)/python -m pytest benchmarks -o timeout=0 $(PYTEST)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks .hypothesis
	find vfiodma -name '*.so' -delete
	rm -f $(VENV)/.installed $(VENV)/.built $(VENV)/.dev
