"""What decides about the speed of a GPU besides its model: clocks, power, temperature, and reasons for lower clocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench import harness

# As nvidia-smi names them.
COLUMNS = (
    "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
    "clocks_event_reasons.active",
)  # fmt: skip
EVERY = 1.5  # seconds between two readings


def read(device: torch.device) -> dict[str, str]:
    """The state of a GPU at this moment, by COLUMNS. Empty on a CPU. Without an answer from nvidia-smi, it says so."""
    if device.type != "cuda":
        return {}
    # A process may see other numbers than nvidia-smi does, so the UUID comes first.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for name in (f"GPU-{uuid}", str(device.index or 0)):
        answer = harness.output(
            "nvidia-smi", f"--id={name}", f"--query-gpu={','.join(COLUMNS)}", "--format=csv,noheader"
        )
        values = [value.strip() for value in (answer or "").split(",")]
        if len(values) == len(COLUMNS):
            return dict(zip(COLUMNS, values, strict=True))
    return {"nvidia-smi": "no answer"}


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, list[str]]]:
    """Read the state of a GPU again and again while it works. After the work its clocks would be those of an idle GPU.

    Yields:
        All values that were seen, by column, each once and in the order in which they came. Complete after the context.
    """
    seen: dict[str, list[str]] = {}
    done = threading.Event()

    def look() -> None:
        more = True
        while more:
            more = not done.wait(EVERY)
            if more or not seen:
                for column, value in read(device).items():
                    if value not in seen.setdefault(column, []):
                        seen[column].append(value)

    thread = threading.Thread(target=look, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        if device.type == "cuda":
            thread.join()
