"""What the callbacks of all frameworks share: a monitor that is attached, logged once per reading, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..monitor.arguments import optimizer_behind
from ..monitor.monitor import Monitor
from ..monitor.reading import Reading


class Watching:
    """Base of a framework's callback, before the framework's own class.

    Args:
        options: arguments of `lwadamw.Monitor` but the optimizer.
        prefix: text in front of every logged name.
        roles_only: log the totals and medians of every role, and nothing of single parameters.

    Attributes:
        monitor: the monitor. None before training.
    """

    def __init__(self, options: Mapping[str, Any], prefix: str, roles_only: bool) -> None:
        super().__init__()
        self.monitor: Monitor | None = None
        self._options, self._prefix, self._roles_only = options, prefix, roles_only
        self._logged: Reading | None = None
        self._loaded: dict[str, Any] | None = None

    def attach(self, optimizer: Any, **more: Any) -> Monitor:
        """Attach the monitor, and let it go on from the state that a checkpoint had.

        Args:
            optimizer: the optimizer, or an object that wraps it.
            **more: further arguments of `lwadamw.Monitor`.
        """
        self.monitor = Monitor(optimizer_behind(optimizer), **more, **self._options)
        loaded, self._loaded = self._loaded, None  # a second training starts without it
        if loaded is not None:
            self.monitor.load_state_dict(loaded)
        return self.monitor

    def detach(self) -> None:
        """Detach the monitor, if there is one. Its readings stay."""
        if self.monitor is not None:
            self.monitor.remove()

    def has_unlogged(self) -> bool:
        """Return whether a reading has been made since the last call of `unlogged`."""
        latest = None if self.monitor is None else self.monitor.latest
        return latest is not None and latest is not self._logged

    def unlogged(self) -> dict[str, float]:
        """Return the latest reading for a logger. Empty if this has been called since it was made."""
        if self.monitor is None or self.monitor.latest is None or not self.has_unlogged():
            return {}
        self._logged = self.monitor.latest
        return self.monitor.as_dict(self._prefix, self._roles_only)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the monitor, for a checkpoint. Empty before training."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the monitor is attached."""
        self._loaded = state_dict or None
