# make demo   trains a small language model at two widths and shows its norms
# make test   runs lint, types and tests: everything that CI runs
# make test-compiled   runs compiled kernels on a pretended GPU, which executes PTX on the CPU; CI runs it after make docs
# make test-matrix   runs every combination of what others may do; CI runs it after make test
# make test-zoo   runs the tests on the real model classes of transformers, timm, diffusers and others; CI runs it then
# make test-engines   runs the tests inside real Megatron-core, on CPU; CI runs it then
# make test-engines-whole   runs every wrapper of Megatron-core in every layout, on the kernels too. CI runs a few of them.
# make test-frameworks   runs the tests inside transformers, Lightning, torchtitan and others, on CPU; CI runs it last
# make check  runs lint and types
# make docs   builds the documentation site in build/site; a warning is an error; CI runs it after make test
# make dist   builds the sdist and the wheel in dist/, the wheel from the sdist, and checks what an index would refuse
# make bench  runs the benchmarks that need no GPU, and updates the figure and the table in README
# make gpu-test   runs the tests that need a GPU; needs only python3, torch, triton and numpy, and pytest for some
# make gpu-bench  runs the benchmarks on a GPU, those that answer the goals of the project first
# make gpu-tune   compares launch constants on a GPU. make gpu runs all three.
#             gpu-test ends after 4 minutes, gpu-bench after 6.5, gpu-tune after 2, whatever is left then. MINUTES=9 gives the
#             one that is made 9 minutes.
# make study  makes the laboratory's runs behind docs/width_transfer.md, then its figures and tables. It takes hours on a CPU.
#             Runs that exist already are not repeated.
# All targets but test-zoo, test-engines, test-engines-whole, test-frameworks, docs, dist, gpu-... and clean build .venv first.
# PYTHON=python3.12 chooses the interpreter for .venv.

PYTHON ?= python3
OUT ?= bench/results
JOBS ?= auto
MINUTES ?=
LIMIT := $(if $(MINUTES),--minutes $(MINUTES))
BIN := .venv/bin
ENGINES := .venv-engines
FRAMEWORKS := .venv-frameworks

.PHONY: demo test test-compiled test-matrix test-zoo test-engines test-engines-whole test-frameworks check docs dist bench study gpu gpu-test gpu-bench gpu-tune clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-matrix: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m matrix

# The test files are those that gpu-test runs on a GPU.
test-compiled: .venv/.installed
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/ptx \
		$$($(BIN)/python -c "from bench.gpu_tests import SUITE; print(*(f'tests/{name}' for name in SUITE))")

.venv-zoo/.installed: tests/architectures/requirements.txt constraints.txt
	test -x .venv-zoo/bin/python || $(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch triton numpy pytest pytest-xdist expecttest hypothesis
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-r tests/architectures/requirements.txt
	touch $@

test-zoo: .venv-zoo/.installed
	OMP_NUM_THREADS=1 .venv-zoo/bin/python -m pytest tests/architectures -m zoo

# Wheels of megatron-core 0.17 and later are for Python 3.12 and later. All that is used of them runs on older Python too.
$(ENGINES)/.installed: tests/engines/requirements.txt constraints.txt Makefile
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch triton numpy pytest
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/requirements.txt
	rm -rf $(ENGINES)/wheels $(ENGINES)/megatron-core-*
	$(ENGINES)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(ENGINES)/wheels megatron-core==0.16.1
	$(ENGINES)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(ENGINES)/wheels \
		--python-version 3.12 --only-binary=:all: megatron-core==0.19.2
	for version in 0.16.1 0.19.2; do \
		$(ENGINES)/bin/python -m zipfile -e $(ENGINES)/wheels/megatron_core-$$version-*.whl $(ENGINES)/megatron-core-$$version \
		|| exit 1; \
	done
	touch $@

# The widest combinations run in one version each, so that each version takes less than 8 minutes on 2 cores.
test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(ENGINES)/megatron-core-0.19.2 $(ENGINES)/bin/python -m pytest tests/engines/megatron -m "engines and not four and not whole"
	OMP_NUM_THREADS=1 PYTHONPATH=$(ENGINES)/megatron-core-0.16.1 $(ENGINES)/bin/python -m pytest tests/engines/megatron -m "engines and not wide and not whole"

test-engines-whole: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(ENGINES)/megatron-core-0.19.2 $(ENGINES)/bin/python -m pytest tests/engines/megatron -m whole

# The pages are made from the sources as text, so this environment needs no torch.
.venv-docs/.installed: constraints.txt Makefile
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict

.venv-dist/.installed: constraints.txt Makefile
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	touch $@

dist: .venv-dist/.installed
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

$(FRAMEWORKS)/.installed: tests/engines/requirements-frameworks.txt tests/engines/requirements-composer.txt constraints.txt
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch triton numpy pytest pytest-xdist
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-r tests/engines/requirements-frameworks.txt
	rm -rf $(FRAMEWORKS)/composer
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		--target $(FRAMEWORKS)/composer -r tests/engines/requirements-composer.txt
	touch $@

test-frameworks: $(FRAMEWORKS)/.installed
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m pytest tests/engines --ignore=tests/engines/megatron -m "engines and not slow" \
		-n $(JOBS) --dist loadfile

bench: .venv/.installed
	$(BIN)/python -m bench.codegen --json bench/results/codegen.json
	$(BIN)/python -m bench.host --device cpu --json bench/results/host.json
	$(BIN)/python -m bench.step --device cpu --json bench/results/cpu_step.json
	$(BIN)/python -m bench.memory --device cpu --json bench/results/memory.json
	$(BIN)/python -m bench.scale --json bench/results/scale.json
	$(BIN)/python -m bench.predict --json bench/results/predictions.json
	$(BIN)/python -m bench.train --device cpu --json bench/results/train_cpu.json
	$(BIN)/python -m bench.monitor --device cpu --json bench/results/monitor_cpu.json
	$(BIN)/python -m bench.report

study: .venv/.installed
	$(BIN)/python -m lwadamw synthetic --out docs/data/synthetic.csv
	$(BIN)/python -m lwadamw sweep --out docs/data/heatmap.csv --arms standard --widths 64 \
		--lr 0.00125 0.0025 0.005 0.01 0.02 0.04 0.08 --weight-decay 0.078125 0.15625 0.3125 0.625 1.25 2.5 5 10
	$(BIN)/python -m lwadamw sweep --out docs/data/transfer.csv --lr 0.00125 0.0025 0.005 0.01 0.02 0.04 --weight-decay 1.25
	$(BIN)/python -m lwadamw sweep --out docs/data/transfer.csv --arms standard --widths 256 --base-width 64 \
		--lr 0.000625 --weight-decay 1.25
	$(BIN)/python -m lwadamw sweep --out docs/data/transfer_low_wd.csv --lr 0.00125 0.0025 0.005 0.01 0.02 --weight-decay 0.3125
	$(BIN)/python -m lwadamw sweep --out docs/data/transfer_low_wd.csv --arms standard --widths 256 --base-width 64 \
		--lr 0.000625 --weight-decay 0.3125
	$(BIN)/python -m lwadamw sweep --out docs/data/series.csv --series --lr 0.005 --weight-decay 1.25 --seeds 1
	$(BIN)/python -m lwadamw scaling --out docs/data
	$(BIN)/python -m lwadamw figures

gpu:
	$(MAKE) --keep-going gpu-test gpu-bench gpu-tune

gpu-test gpu-bench gpu-tune: export PYTHONPATH := .:$(PYTHONPATH)
gpu-test gpu-bench gpu-tune: export PYTHONUNBUFFERED := 1

gpu-test:
	$(PYTHON) -m bench.gpu_tests --out $(OUT) $(LIMIT)

gpu-bench:
	$(PYTHON) -m bench.gpu_bench --out $(OUT) $(LIMIT)

gpu-tune:
	$(PYTHON) -m bench.tune --device cuda --json $(OUT)/tune.json $(LIMIT)

clean:
	rm -rf .venv .venv-zoo .venv-engines .venv-frameworks .venv-docs .venv-dist build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
