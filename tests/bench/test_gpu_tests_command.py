"""gpu_tests: which processes it starts, what it reports, and that one failure hides no other."""

import inspect
import json
import sys
import time
import unittest

import pytest

from bench import gpu_tests
from bench.gpu_tests import Job
from tests.bench.commands import ROOT

LONG = 30  # lines that a table may have at most


def _job(code, part="suite", **options):
    return Job(part, options.pop("name", "a process"), [sys.executable, "-c", code], **options)


def test_the_dry_run_of_gpu_test_starts_every_kind_of_process(monkeypatch, capsys, tmp_path):
    arguments = ["--dry-run", "--out", str(tmp_path), "--files", "state/test_codes.py"]
    monkeypatch.setattr(sys, "argv", ["bench.gpu_tests", *arguments])
    gpu_tests.main()
    (path,) = tmp_path.iterdir()
    found = {job["part"]: job for job in json.loads(path.read_text())["jobs"]}
    assert {part: job["outcome"] for part, job in found.items()} == dict.fromkeys(gpu_tests.PARTS, "passed")
    assert found["functions"]["last"] == f"{len(gpu_tests.gpu_tests())} passed, 0 failed"
    assert found["sanitizer"]["last"] == "1 storages stepped on cpu"
    assert "suite: 1 passed of 1 processes" in capsys.readouterr().out


def test_every_function_is_in_one_process_and_every_file_exists():
    jobs = gpu_tests.jobs(gpu_tests.PARTS, gpu_tests.SUITE, dry=False)
    functions = [name for job in jobs if job.part == "functions" for name in job.command if "::" in name]
    assert sorted(functions) == sorted(gpu_tests.gpu_tests())
    files = [argument for job in jobs for argument in job.command if argument.startswith("tests/")]
    assert len(files) == len(gpu_tests.SUITE)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert {job.name for job in jobs if job.part == "sanitizer"} == set(gpu_tests.SANITIZERS)


def test_every_test_function_that_gpu_test_runs_takes_no_arguments():
    """bench.gpu_tests calls these functions without pytest, so no fixture can be filled in."""
    tests = gpu_tests.gpu_tests()
    assert {test.__module__ for test in tests.values()} == {"tests.kernels.test_gpu", "tests.kernels.test_gpu_storage"}
    assert [name for name, test in tests.items() if inspect.signature(test).parameters] == []


def test_a_function_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def fails():
        raise ValueError("3 is not 4\nand more")

    def cannot():
        raise unittest.SkipTest("needs two GPUs")

    tests = {"a.py::one": fails, "a.py::two": lambda: None, "a.py::three": cannot}
    monkeypatch.setattr(gpu_tests, "gpu_tests", lambda: tests)
    assert gpu_tests.run_functions(list(tests), dry=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED a.py::one - ValueError: 3 is not 4"
    assert lines[1].startswith("passed a.py::two")
    assert lines[2:] == ["skipped a.py::three - needs two GPUs", "1 passed, 1 failed, 1 skipped"]


def test_a_function_that_the_machine_cannot_run_is_in_the_table():
    job = _job("print('skipped t.py::x - needs two GPUs\\n1 passed, 0 failed, 1 skipped')").run(time.monotonic() + 60)
    assert (job.outcome, job.skipped) == ("passed", [("t.py::x", "needs two GPUs")])
    assert gpu_tests.table([job]).splitlines()[-1] == "skipped t.py::x: needs two GPUs"


@pytest.mark.parametrize(
    ("code", "outcome", "failures"),
    [
        ("print('2 passed')", "passed", []),
        ("import os; os._exit(3)", "FAILED", [("a process", "nothing was printed")]),
        ("print('FAILED t.py::x - E: 1\\n1 failed'); exit(1)", "FAILED", [("t.py::x", "E: 1")]),
        (
            "import time; print('FAILED t.py::x - E: 1', flush=True); time.sleep(60)",
            "not finished",
            [("t.py::x", "E: 1")],
        ),
        (
            "import time; print('t.py::x[a, b] FAILED  [ 5%]\\nt.py::y PASSED [ 6%]'); time.sleep(60)",
            "not finished",
            [("t.py::x[a, b]", "see the log")],
        ),
        (
            "print('t.py::x[a, b] FAILED [9%]\\nFAILED t.py::x[a, b] - E: 1'); exit(1)",
            "FAILED",
            [("t.py::x[a, b]", "E: 1")],
        ),
    ],
)
def test_a_process_is_reported_whether_it_ends_crashes_or_hangs(code, outcome, failures):
    job = _job(code).run(time.monotonic() + (3 if outcome == "not finished" else 60))
    assert (job.outcome, job.failures) == (outcome, failures)


def test_a_process_is_ended_with_the_processes_that_it_started(tmp_path):
    """compute-sanitizer starts the program as another process, which holds the pipe open and uses the GPU."""
    inner = f"import time; print('inner runs', flush=True); time.sleep(20); open({str(tmp_path / 'end')!r}, 'w')"
    job = _job(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])").run(time.monotonic() + 5)
    assert (job.outcome, job.last) == ("not finished", "inner runs")
    assert job.failures == [("a process", "not finished: inner runs")]
    assert not (tmp_path / "end").exists()


def test_processes_that_cannot_run_say_why():
    late = _job("print(1)").run(time.monotonic() - 1)
    missing = _job("print(1)", last="pytest is not installed").run(time.monotonic() + 60)
    assert [(job.outcome, job.last) for job in (late, missing)] == [
        ("not run", "no time left"),
        ("not run", "pytest is not installed"),
    ]
    assert gpu_tests.table([late, missing]) == "suite: 2 not run of 2 processes: no time left; pytest is not installed"


def test_the_table_of_gpu_test_names_failures_of_every_part_in_at_most_thirty_lines():
    jobs = [
        _job("", part, outcome="FAILED", failures=[(f"{part} {i}", "E") for i in range(30)]) for part in gpu_tests.PARTS
    ]
    table = gpu_tests.table(jobs)
    assert table.count("\n") + 2 <= LONG
    assert f"and {90 - gpu_tests.ROWS} more" in table
    assert all(f"{part}: 1 FAILED of 1 processes" in table for part in gpu_tests.PARTS)


def test_processes_keep_the_python_path_of_carried_wheels(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried/wheels")
    job = _job("import os; print(os.environ['PYTHONPATH'])").run(time.monotonic() + 60)
    assert job.last == ".:/carried/wheels"
