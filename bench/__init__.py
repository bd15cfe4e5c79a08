"""Benchmarks. Each command answers one question. `--help` says what the command measures, and how.

python -m bench.step        How long does a step take, and how close is it to the speed of a copy?
python -m bench.host        How much host time does step() take?
python -m bench.codegen     Which code does the compiler make from the kernels?
python -m bench.memory      How much memory does a step need in addition to parameters, gradients and state?
python -m bench.train       How many tokens per second does a small LLaMA train at?
python -m bench.monitor     Which share of the training time does lwadamw.Monitor take?
python -m bench.predict     How long should a step take on six devices, by bytes, instructions and waves?
python -m bench.tune        Which launch constants of the kernels are fastest?
python -m bench.scale       What does one process of a 405B model's run pay for each step?
python -m bench.gpu_bench   Does a GPU meet the goals of the project? All of these except codegen, predict, scale and tune.
python -m bench.gpu_tests   Which tests fail on a machine with a GPU?
python -m bench.report      Writes the figure and the table in README from bench/results.
python -m bench.workloads   Prints the parameter lists that are stepped.
pytest bench/ --benchmark-only
"""
