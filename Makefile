# One environment for everything; `make run` and `make test` need Python 3.11+, make and a C++ compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help run test gpu-test lint format bench docs clean

help:
	@echo "make run       install, load the bundled model, generate"
	@echo "make test      install, run the tests (those that need a GPU are skipped where there is none)"
	@echo "make gpu-test  only the tests that need a GPU, with the Python that is active"
	@echo "make lint      ruff, mypy, clang-format: report only"
	@echo "make format    ruff and clang-format: rewrite"
	@echo "make bench     decode attention and whole-model benchmarks on the GPU, with the Python that is active"
	@echo "make docs      rewrite the figures and tables in the docs from the result files"

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

run: $(VENV)/run.stamp
	$(BIN)/python test_llama3.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

gpu-test:
	$(PYTHON) -m pytest -m gpu

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs -r $(BIN)/clang-format -i

bench:
	$(PYTHON) benchmark_kernel.py --suite
	$(PYTHON) benchmark_model.py --shape 1b --suite seed

docs: $(VENV)/dev.stamp
	$(BIN)/python tools/render_docs.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
