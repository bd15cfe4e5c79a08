"""Fixtures of the benchmark tests."""

import gc
import json
import sys

import pytest
import torch

from bench import revision, step
from lwadamw.lab import data
from tests.bench.commands import start


@pytest.fixture
def base_is_forgotten():
    """The package of another revision is removed from sys.modules after the test, so that the next test can load one."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == revision.NAME]:
        del sys.modules[name]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a benchmark with a command line. It returns the printed lines, or the JSON record if asked for.

    The command runs in this process, because a new process needs several seconds to import torch. On a machine with a GPU it
    runs in a new process, because the kernels of this process are compiled and dry runs on the CPU need interpreted ones.
    """

    def run_(module, *arguments, json_to=None):
        arguments = [*arguments, *(["--json", str(json_to)] if json_to else [])]
        if torch.cuda.is_available():
            done = start(module.__name__, *arguments)
            assert done.returncode == 0, done.stdout + done.stderr
            printed = done.stdout
        else:
            monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
            monkeypatch.setitem(step.TURN, "cpu", 0.0)  # A turn is one step, because no test reads the times.
            capsys.readouterr()
            gc.freeze()  # The benchmarks collect garbage often, and the heap of the test process is large.
            try:
                module.main()
            finally:
                gc.unfreeze()
            printed = capsys.readouterr().out
        lines = printed.splitlines()
        assert any(line.startswith("| --") for line in lines), "no table"
        if json_to is None:
            return lines
        record = json.loads(json_to.read_text())
        assert {"device", "driver", "torch", "triton", "python", "commit", "date"} <= record["machine"].keys()
        assert record["command"].startswith(f"python -m {module.__name__} --dry-run")
        return record

    return run_


@pytest.fixture
def short_text(monkeypatch):
    """Benchmarks that train a model read a short text instead of the whole standard library."""
    corpus = data.Corpus(*data.split_files([b"a text of a few words to train on. " * 20] * 16), source="test")
    monkeypatch.setattr(data, "standard_library", lambda: corpus)
