"""Agreement: all processes tell each other what they found, so that each of them raises the same error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def from_all(mine: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks. This is collective.

    Args:
        mine: what this process gives. It can be pickled.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [mine]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, mine)
    return values


@contextmanager
def same_error() -> Iterator[None]:
    """Raise the error of the first process that has one on every process. Leaving the context is collective.

    Raises:
        TypeError, ValueError or RuntimeError: a process raised it inside the context. All raise the same type and text.
    """
    mine: tuple[type[Exception], str] | None = None
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        kind = next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
        mine = kind, str(error)
    first = next((found for found in from_all(mine) if found is not None), None)
    if first is not None:
        raise first[0](first[1])
