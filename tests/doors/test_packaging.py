"""Wheel, sdist, editable install and bare checkout each import, kernels included, and carry real files."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import pathlib, lwadamw, lwadamw.lab
from lwadamw import kernels
from lwadamw.kernels import adamw_kernel, layout
assert layout.BLOCK == 1024
print(pathlib.Path(kernels.__file__).resolve())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of what git would check out."""
    copy = tmp_path_factory.mktemp("checkout") / "lwadamw"
    ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", "*.egg-info", ".*_cache", "build", "dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture
def python(tmp_path):
    """A clean environment that sees this one's dependencies, but not its lwadamw."""
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


def _install(python, archive, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", archive, cwd=tmp_path)


def test_wheel(source, python, tmp_path):
    wheel = _build(source, "build_wheel", tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"lwadamw/py.typed", "lwadamw/kernels/adamw.py", "lwadamw/kernels/README.md", "lwadamw/lab/demo.py"} <= names
    assert not any(name.startswith(("tests", "bench", "csrc_triton")) for name in names)
    _install(python, wheel, tmp_path)
    assert "site-packages" in _run(python, "-c", CHECK, cwd=tmp_path)


def test_sdist(source, python, tmp_path):
    sdist = _build(source, "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert any(m.name.endswith("csrc_triton/adamw.py") and m.isfile() for m in members)
    _install(python, sdist, tmp_path)
    assert "site-packages" in _run(python, "-c", CHECK, cwd=tmp_path)


def test_editable_install(source, python, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", "-e", source, cwd=tmp_path)
    assert str(source) in _run(python, "-c", CHECK, cwd=tmp_path)


def test_bare_checkout(source, python, tmp_path):
    assert str(source / "csrc_triton") in _run(python, "-c", CHECK, cwd=source)
    assert str(source / "csrc_triton") in _run(python, "-c", CHECK, cwd=tmp_path, PYTHONPATH=str(source))


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
