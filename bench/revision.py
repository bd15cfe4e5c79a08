"""Imports the package of another git revision beside the package of the working tree, under another name."""

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
# The folders are kept until the process ends, because Triton reads the kernel sources again when it compiles.
_folders: list[tempfile.TemporaryDirectory[str]] = []


def load(rev: str) -> ModuleType:
    """Import revision `rev` as `lwadamw_base`, with its kernels. A process can load only one revision.

    Args:
        rev: a git revision, for example "HEAD~1".

    Raises:
        RuntimeError: git or the revision is missing, or another revision has been loaded already.
    """
    if NAME in sys.modules:
        raise RuntimeError(
            f"--base {rev}: another revision has been loaded in this process already. Start a new process."
        )
    command = ["git", "archive", "--format=tar", rev, "lwadamw", "csrc_triton"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except OSError as error:
        raise RuntimeError(f"--base {rev}: needs git and the repository, but git was not found.") from error
    if done.returncode:
        raise RuntimeError(f"--base {rev}: git archive failed: {done.stderr.decode().strip()}")
    folder = tempfile.TemporaryDirectory(prefix="lwadamw_base_")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder.name, **safe)
    return import_from(folder, NAME)


def import_from(folder: tempfile.TemporaryDirectory[str], name: str) -> ModuleType:
    """Import a copy of the package under another name.

    Args:
        folder: a folder that contains `lwadamw` and `csrc_triton`. It is kept until the process ends.
        name: the name under which the package is imported.
    """
    _folders.append(folder)
    # Renaming works because the package imports itself only by relative names, and its link to the kernels is relative.
    (Path(folder.name) / "lwadamw").rename(Path(folder.name) / name)
    sys.path.insert(0, folder.name)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder.name)


def load_or_exit(rev: str | None) -> ModuleType | None:
    """Like `load`, for a command line: returns None if there is no revision, and exits with a message on an error."""
    if rev is None:
        return None
    try:
        return load(rev)
    except RuntimeError as error:
        sys.exit(str(error))
