"""Upload: a device table that the host rewrites between two steps without waiting for the device."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray


class Upload:
    """A device table of int64 words, and the same words on the host, where they are written.

    For a GPU, every upload copies the words into pinned memory first, and from there to the device. The host may be many
    steps ahead of the device, so pinned memory is used again only after the device has copied out of it. It consists of
    pages as long as the table. Many short uploads share one page and one event.

    `table` is int64[words] on the device. `words` and `floats` are the host's int64[words] and float64[words], two views of
    the same memory. On the CPU they are views of `table` too.

    Args:
        words: number of words.
        device: where the kernels read the table. It has to be the current device here and whenever `send` is called.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self.on_host = device.type == "cpu"
        self.table = torch.zeros(words, dtype=torch.int64, device=device)
        self.words: NDArray[np.int64] = self.table.numpy() if self.on_host else np.zeros(words, np.int64)
        self.floats: NDArray[np.float64] = self.words.view(np.float64)
        self._page: _Page | None = None  # the page that is being filled
        self._full: deque[_Page] = deque()  # oldest first

    def send(self, first: int = 0, last: int | None = None) -> None:
        """Make the device see words [first, last) as the host has them now, from the next launch on the current stream on.

        Args:
            first: index of the first word.
            last: index after the last word; None: the end of the table.
        """
        if self.on_host:
            return
        last = len(self.words) if last is None else last
        if self._page is not None and not self._page.has_room(last - first):
            self._close_page()
        if self._page is None:
            self._page = self._empty_page()
        self._page.copy(self, first, last)
        if not self._page.has_room(1):
            self._close_page()

    def _close_page(self) -> None:
        if self._page is not None:
            self._page.copied.record(torch.cuda.current_stream(self.table.device))
            self._full.append(self._page)
            self._page = None

    def _empty_page(self) -> _Page:
        """Return a page out of which the device has copied everything, or a new one."""
        if self._full and self._full[0].copied.query():  # type: ignore[no-untyped-call]
            page = self._full.popleft()
            page.used = 0
            return page
        return _Page(len(self.words))


class CapturedUpload(Upload):
    """The upload of a step that is captured in a CUDA graph. Each replay copies out of the pinned memory again.

    So the pinned memory is written once, and has to be kept as long as the graph may be replayed. It is allocated here,
    because an allocation during a capture may end the capture.

    Args:
        words: number of words.
        device: as for `Upload`.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        super().__init__(words, device)
        self._only_page = _Page(words)

    def send(self, first: int = 0, last: int | None = None) -> None:
        """Record the copy of words [first, last) in the graph that is being captured. Call this once.

        Args:
            first: index of the first word.
            last: index after the last word; None: the end of the table.
        """
        self._only_page.copy(self, first, len(self.words) if last is None else last)


class _Page:
    """Pinned memory that is filled from its beginning to its end.

    `copied` is the event that the device has copied out of it. Whoever has filled the page records the event.
    """

    def __init__(self, words: int) -> None:
        # The device is named, because torch.set_default_device may have set another one.
        self._pinned = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)
        self._view: NDArray[np.int64] = self._pinned.numpy()
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.used = 0

    def has_room(self, words: int) -> bool:
        return self.used + words <= len(self._view)

    def copy(self, upload: Upload, first: int, last: int) -> None:
        """Copy words [first, last) of the host to the device."""
        begin, self.used = self.used, self.used + last - first
        self._view[begin : self.used] = upload.words[first:last]
        upload.table[first:last].copy_(self._pinned[begin : self.used], non_blocking=True)
