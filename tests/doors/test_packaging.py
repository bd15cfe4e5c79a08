"""A wheel, an sdist, an editable install and a bare checkout each import, with the kernels, and carry real files."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lwadamw

ROOT = Path(__file__).parents[2]
CHECK = """
import pathlib, lwadamw
lwadamw.schedules.exponential_warmup, lwadamw.loggers.WandbLogger
import lwadamw.lab
from lwadamw import kernels
from lwadamw.kernels import adamw_kernel, layout
assert layout.BLOCK == 1024
print(pathlib.Path(kernels.__file__).resolve())
"""
STEPS = """
import torch, lwadamw
start, after = torch.linspace(-1, 1, 1100).reshape(11, 100), {}
for backend in ("torch", "triton"):
    p = torch.nn.Parameter(start.clone())
    optimizer = lwadamw.AdamW([p], lr=0.01, backend=backend, max_grad_norm=1.0)
    for _ in range(2):
        p.grad = p.detach().sin()
        optimizer.step()
    after[backend] = p.detach()
    assert abs(optimizer.norms().weight[0] - p.double().norm().item()) < 1e-4
torch.testing.assert_close(after["triton"], after["torch"], rtol=1e-5, atol=1e-6)
assert not after["torch"].equal(start)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of what git would check out."""
    copy = tmp_path_factory.mktemp("checkout") / "lwadamw"
    ignored = shutil.ignore_patterns(
        ".venv*", ".git", ".hypothesis", "__pycache__", "*.egg-info", ".*_cache", "build", "dist"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return _build(source, "build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that has the dependencies of this one, but no lwadamw."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lwadamw" not in entry.name and entry.suffix != ".pth":
            (dependencies / entry.name).symlink_to(entry)
    (site / "dependencies.pth").write_text(str(dependencies))
    return tmp_path / "env" / "bin" / "python"


def _run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**env, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(source, what, out):
    code = f"from setuptools import build_meta as b; print(b.{what}({str(out)!r}))"
    return out / _run(sys.executable, "-c", code, cwd=source).split()[-1]


def _install(python, *what, cwd):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    _run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", *what, cwd=cwd)


def _contents(wheel):
    """{name: bytes} of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    files = _contents(wheel)
    (metadata,) = (text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {lwadamw.__version__}\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata
    assert {
        "lwadamw/py.typed",
        "lwadamw/kernels/adamw.py",
        "lwadamw/kernels/README.md",
        "lwadamw/lab/demo.py",
    } <= files.keys()
    assert not any(name.startswith(("tests", "bench", "csrc_triton")) for name in files)


def test_an_installed_wheel_steps_on_both_backends_and_has_the_command_line(wheel, python, tmp_path):
    (entry_points,) = (text for name, text in _contents(wheel).items() if name.endswith("entry_points.txt"))
    assert entry_points.decode().split() == ["[console_scripts]", "lwadamw", "=", "lwadamw.commands:main"]
    _install(python, wheel, cwd=tmp_path)
    assert "site-packages" in _run(python, "-c", CHECK + STEPS, cwd=tmp_path, TRITON_INTERPRET="1")
    assert "rule" in _run(python.parent / "lwadamw", "--help", cwd=tmp_path)


def test_the_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = _build(source, "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        assert any(m.name.endswith("csrc_triton/adamw.py") and m.isfile() for m in archive.getmembers())
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert _contents(_build(unpacked, "build_wheel", tmp_path)) == _contents(wheel)


@pytest.mark.matrix
def test_an_editable_install_imports(source, python, tmp_path):
    _install(python, "-e", source, cwd=tmp_path)
    assert str(source) in _run(python, "-c", CHECK, cwd=tmp_path)


def test_a_bare_checkout_imports_in_its_own_folder(source, python):
    assert str(source / "csrc_triton") in _run(python, "-c", CHECK, cwd=source)


@pytest.mark.matrix
def test_import_of_a_bare_checkout_makes_the_warm_ups_and_the_loggers_usable(source, python, tmp_path):
    """CHECK uses both before it imports anything else of the package."""
    assert str(source / "csrc_triton") in _run(python, "-c", CHECK, cwd=tmp_path, PYTHONPATH=str(source))


USERS = """
import torch
import lwadamw
from lwadamw.engines import huggingface, lightning

model = torch.nn.Linear(8, 8)
groups = lwadamw.param_groups(model, base_width=4, width=8, roles={"weight": "matrix"})
optimizer = lwadamw.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0, exp_avg_dtype=torch.bfloat16)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
monitor = lwadamw.Monitor(optimizer, model, every=10)
norms: lwadamw.Norms = optimizer.norms()
names: list[str] = list(norms.names)
text: str = lwadamw.summary(optimizer, steps=100)
print(monitor.report(), names, text)
"""


@pytest.mark.matrix
def test_a_strict_project_of_a_user_is_type_checked_against_the_installed_package(wheel, python, tmp_path):
    _install(python, wheel, cwd=tmp_path)
    (tmp_path / "right.py").write_text(USERS)
    (tmp_path / "wrong.py").write_text(USERS.replace("base_width=4", "base_width='4'") + "monitor.raport()\n")
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    assert "no issues" in _run(*check, "right.py", cwd=tmp_path)
    done = subprocess.run([*check, "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert {line.rpartition("[")[2] for line in done.stdout.splitlines()[:-1]} == {"arg-type]", "attr-defined]"}, (
        done.stdout
    )


def test_the_link_to_the_kernels_is_relative():
    assert os.readlink(ROOT / "lwadamw" / "kernels") == "../csrc_triton"


def test_import_needs_neither_triton_nor_the_lab(source, python, tmp_path):
    blocked = """
import sys
for name in ("triton", "rich", "matplotlib"):
    sys.modules[name] = None
import torch, lwadamw.step.backends
lwadamw.step.backends.has_triton = lambda: False
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
lwadamw.AdamW([p]).step()
assert "triton" not in [m for m in sys.modules if sys.modules[m] is not None]
print("fine")
"""
    assert "fine" in _run(python, "-c", blocked, cwd=tmp_path, PYTHONPATH=str(source))
