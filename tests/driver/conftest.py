"""Fixture of the driver room: the pretended CUDA driver in the place of the real one."""

import pytest
import torch

from lwadamw.step.backends import interpreting
from lwadamw.tables.launch import Launch
from tests.driver.fake_cuda import Driver, Event


@pytest.fixture
def driver(monkeypatch):
    """A pretended driver with two devices. cuda:0 is the current device."""
    if torch.cuda.is_available():
        pytest.skip("the driver is pretended, and this machine has a real one")
    if not interpreting():
        pytest.skip("the pretended driver runs kernels on Triton's interpreter")
    driver = Driver()
    replaced = {
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "current_device": lambda: driver.device_index,
        "current_stream": driver.current_stream,
        "is_current_stream_capturing": lambda: driver.current_stream().graph is not None,
        "get_device_capability": lambda *_: (9, 0),
        "device": driver.device,
        "stream": driver.stream,
        "Event": lambda: Event(driver),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # torch.tensor goes past the dispatcher, so it is made of two calls that do not.
    tensor = torch.tensor

    def tensor_on(data, *, device="cpu", **options):
        return tensor(data, device="cpu", **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor_on)
    monkeypatch.setattr(Launch, "__call__", lambda launch: driver.launch(launch))
    with driver:
        yield driver
