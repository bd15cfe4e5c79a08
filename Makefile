# make demo   train a small language model at two widths and look at its norms
# make test   everything CI runs: lint, types, tests
# make gpu    GPU tests, then benchmarks; needs only python3, torch, triton and numpy
# make check  lint and types
# make bench  what can be measured without a GPU, and README's figure of it
# The first two build .venv by themselves. PYTHON=python3.12 chooses the interpreter it is built from.

PYTHON ?= python3
OUT ?= bench/results
BIN := .venv/bin

.PHONY: demo test check bench gpu clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab,dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python -m lwadamw demo

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

bench: .venv/.installed
	$(BIN)/python -m bench.codegen --json bench/results/codegen.json
	$(BIN)/python -m bench.host --device cpu --json bench/results/host.json
	$(BIN)/python -m bench.step --device cpu --json bench/results/cpu_step.json
	$(BIN)/python -m bench.memory --device cpu --json bench/results/memory.json
	$(BIN)/python -m bench.train --device cpu --json bench/results/train_cpu.json
	$(BIN)/python -m bench.report

gpu:
	PYTHONPATH=. PYTHONUNBUFFERED=1 $(PYTHON) -m bench.gpu --out $(OUT)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
