"""The stand-in for transformers, and config files for it."""

import json
import sys
from pathlib import Path

import pytest

from tests.commands import standin_transformers


@pytest.fixture
def transformers(tmp_path, monkeypatch):
    """The stand-in, importable as transformers."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "transformers.py").write_text(Path(standin_transformers.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path / "lib")
    real = sys.modules.pop("transformers", None)
    import transformers

    assert transformers.__version__ == standin_transformers.__version__
    yield transformers
    del sys.modules["transformers"]
    if real is not None:
        sys.modules["transformers"] = real


@pytest.fixture
def config(tmp_path, transformers):
    """Writes a config.json and returns its path."""

    def write(**fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return str(path)

    return write
