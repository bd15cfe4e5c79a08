"""Benchmarks that answer one question each. `--help` of each says what is measured, and how.

python -m bench.step        how long does a step take, and how near to a copy's speed is it?
python -m bench.host        what does step() cost the host?
python -m bench.codegen     what does the compiler make of the kernels?
python -m bench.memory      how much memory does a step need beyond parameters, gradients and state?
python -m bench.train       how many tokens per second does a small LLaMA train at?
python -m bench.gpu         all of it, and the GPU tests, on a machine with one
python -m bench.report      README's figure and table, from bench/results
python -m bench.workloads   what is stepped
pytest bench/ --benchmark-only
"""
