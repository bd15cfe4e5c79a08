"""Fixtures of every test: kernels on CPU tensors where there is no GPU, poisoned memory, a fresh seed."""

import os
import sys

import torch

# Triton decides as the kernels are first imported whether to interpret them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.interpreter import patch_language_once_per_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once_per_launch()

# torch.device("meta") remembers at its first use which functions it redirects: that has to be torch.empty itself, not
# what a fixture puts in its place.
with torch.device("meta"):
    torch.empty(0)

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lwadamw")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill with NaN whatever the package allocates without initialising it, so that an unwritten output shows."""

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
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
