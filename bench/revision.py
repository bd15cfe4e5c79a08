"""The package as another git revision has it, imported beside the working tree's under a name of its own."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

from bench.harness import ROOT

NAME = "lwadamw_base"
_folders: list[tempfile.TemporaryDirectory[str]] = []  # Triton reads the sources of kernels when it compiles them


def load(rev: str) -> ModuleType:
    """Import revision `rev` as `lwadamw_base`, kernels included. One revision per process.

    Raises:
        RuntimeError: git or the revision is missing, or another revision has been loaded.
    """
    if NAME in sys.modules:
        raise RuntimeError(f"--base {rev}: another revision has been loaded in this process.")
    command = ["git", "archive", "--format=tar", rev, "lwadamw", "csrc_triton"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except OSError as error:
        raise RuntimeError(f"--base {rev}: needs git and the repository, and there is no git here.") from error
    if done.returncode:
        raise RuntimeError(f"--base {rev}: git archive failed: {done.stderr.decode().strip()}")
    folder = tempfile.TemporaryDirectory(prefix="lwadamw_base_")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder.name, **safe)
    return import_from(folder, NAME)


def import_from(folder: tempfile.TemporaryDirectory[str], name: str) -> ModuleType:
    """Import a copy of the package, `lwadamw` and `csrc_triton` in a folder, under another name; the folder lives on."""
    _folders.append(folder)
    # The package imports itself by relative names only, and its link to the kernels is relative too.
    (Path(folder.name) / "lwadamw").rename(Path(folder.name) / name)
    sys.path.insert(0, folder.name)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder.name)


def load_or_exit(rev: str | None) -> ModuleType | None:
    """`load` for a command line: None without a revision, a message instead of a traceback."""
    if rev is None:
        return None
    try:
        return load(rev)
    except RuntimeError as error:
        sys.exit(str(error))
