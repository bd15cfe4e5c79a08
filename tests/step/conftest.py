"""Fixture of the step room: one optimizer whose parameters are split between both backends."""

import pytest
import torch

from lwadamw.step import engine


@pytest.fixture
def triton_takes_fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give fp32 parameters to the Triton backend and all others to the torch backend, on any device."""
    monkeypatch.setattr(engine, "use_triton", lambda member, *_: member.param.dtype == torch.float32)
