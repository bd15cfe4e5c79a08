"""Fixtures of every test: kernels run on CPU tensors if there is no GPU, memory is poisoned, the seed is fresh."""

import os
import sys
from collections.abc import Iterator

import torch

# Triton decides whether to interpret kernels when they are imported for the first time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.interpreter import quicken

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()

# torch.device("meta") remembers at its first use which functions it redirects. It has to see the real torch.empty, not the
# function that a fixture puts in its place.
with torch.device("meta"):
    torch.empty(0)

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lwadamw")


@pytest.fixture(scope="session", autouse=True)
def _pretended_gpu() -> Iterator[None]:
    """Without a GPU and without the interpreter, compiled kernels run on the pretended GPU of tests/ptx."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0":
        yield
        return
    from tests.ptx.gpu import pretended

    with pretended():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    # torch.manual_seed also keeps a traceback for each kind of device that is not there. That took two thirds of a setup.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that the package allocates without initialising it with NaN, so that a test sees an unwritten output."""

    def poisoned(original):
        def allocate(*args, **kwargs):
            out = original(*args, **kwargs)
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE) and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Run the test once with each backend."""
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that tests run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
