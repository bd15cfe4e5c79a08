"""Fixtures of every test: kernels run on CPU tensors if there is no GPU, memory is poisoned, the seed is fresh."""

import importlib.util
import os
import sys

import torch

# Triton decides whether to interpret kernels when they are imported for the first time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# torch.device("meta") remembers at its first use which functions it redirects. It has to see the real torch.empty, not the
# function that a fixture puts in its place.
with torch.device("meta"):
    torch.empty(0)

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lwadamw")


@pytest.fixture(scope="session", autouse=True)
def _patch_language_once_per_launch() -> None:
    """Make Triton's interpreter two to three times faster.

    The interpreter replaces the functions of triton.language for the duration of a launch. Triton 3.9 searches the whole
    language for functions to replace again whenever a kernel calls a device function, and finds nothing new. This fixture
    leaves out those searches. It does nothing with versions of Triton that work in another way.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    search = interpreter._patch_lang
    modules_of: dict[object, frozenset[str]] = {}  # names of the language modules that a kernel's file imports
    patched: set[str] = set()  # names of the modules that the current launch has patched

    def patch(fn: object) -> object:
        if fn not in modules_of:
            values = list(fn.__globals__.values())
            modules_of[fn] = frozenset(m.__name__ for m in (tl, tl.core) if any(value is m for value in values))
        if modules_of[fn] and modules_of[fn] <= patched:
            return interpreter._LangPatchScope()
        scope = search(fn)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.clear()

        patched.update(modules_of[fn])
        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
