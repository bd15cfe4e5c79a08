"""A pretended CUDA driver on the CPU. It executes nothing until it is told to, like a device that is far behind the host.

Tensors on "cuda:0" and "cuda:1" keep their memory on the CPU. Launches, copies and torch operations are put into the queue of
the current stream of their device. `Driver.run` executes what is queued, in an order that streams and events allow. So a test
sees what a kernel reads when it runs, and not what was there when the host launched it.

The driver refuses what a real device refuses or answers with silent damage: a launch while another device is the current one,
an operation on tensors of several devices, and pinned allocations or event queries while a graph is being captured. A copy to
the CPU that nobody waits for holds NaN until it is executed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from lwadamw.tables.launch import Launch


class Pretended(torch.Tensor):
    """A tensor on a pretended device. `raw` is its memory, a CPU tensor of the same geometry."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device, driver: Driver) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )

    def __init__(self, raw: torch.Tensor, device: torch.device, driver: Driver) -> None:
        self.raw, self.driver = raw, driver
        driver.memory.append(raw)

    def record_stream(self, stream: Any) -> None:
        self.driver.recorded.append((self.raw.data_ptr(), stream))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data_ptr:
            return _raw(args[0]).data_ptr()
        with torch._C.DisableTorchFunctionSubclass():
            # torch's own indexing and copying ask for a device guard, which a build for the CPU does not have.
            if func is torch.Tensor.copy_:
                return _copy(*args, **(kwargs or {}))
            if func is torch.Tensor.tolist:
                args[0].driver.waits += 1
                args[0].driver.run()
                return args[0].raw.tolist()
            if func is torch.Tensor.__getitem__:
                return _part(*args)
            if func is torch.Tensor.__setitem__:
                return _part(*args[:2]).fill_(args[2])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        driver = next(a.driver for a in tree_flatten((args, kwargs))[0] if isinstance(a, Pretended))
        return driver.dispatch(func, args, kwargs or {})


def _part(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """Return `tensor[index]` for an index of integers and slices."""
    dim = 0
    for place in index if isinstance(index, tuple) else (index,):
        if isinstance(place, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, place.start, place.stop, place.step or 1)
            dim += 1
        else:
            tensor = torch.ops.aten.select.int(tensor, dim, place)
    return tensor


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)`, past autograd."""
    driver = next(t.driver for t in (target, source) if isinstance(t, Pretended))
    torch._C._increment_version([target])
    with _disable_current_modes():
        return driver.dispatch(torch.ops.aten.copy_.default, (target, source, non_blocking), {})


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretended) else value


class Stream:
    """A stream: a queue of operations, and the graph that captures them if there is one."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self.driver, self.device = driver, device
        self.queue: deque[tuple[str, Any]] = deque()
        self.graph: Graph | None = None

    def put(self, kind: str, what: Any) -> None:
        if self.graph is None:
            self.queue.append((kind, what))
        elif kind == "call":
            self.graph.calls.append(what)
        else:
            raise AssertionError(f"a graph is being captured, and {kind} concerns an event outside of it")

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.driver)
        event.record(other)
        self.put("wait", event.token)


class Event:
    """An event. `token` is [whether it has happened], a new one at every record."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.token = driver, [True]

    def record(self, stream: Stream | None = None) -> None:
        self.token = [False]
        (stream or self.driver.current_stream()).put("record", self.token)

    def query(self) -> bool:
        assert not self.driver.capturing_anywhere(), "cudaEventQuery during a capture"
        self.driver.queries += 1
        return self.token[0]


class Graph:
    """A captured graph."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        stream = self.driver.current_stream()
        for call in self.calls:
            stream.put("call", call)


class Driver(TorchDispatchMode):
    """The devices, and the state of `torch.cuda`.

    Attributes:
        queries: number of event queries so far.
        pinned: number of pinned buffers allocated so far.
        uploaded: number of elements copied from pinned memory to a device so far.
        waits: number of times that the host has waited for a device.
        recorded: (address, stream) of every `record_stream`.
    """

    def __init__(self, n_devices: int = 2) -> None:
        super().__init__()
        self.devices = [torch.device("cuda", i) for i in range(n_devices)]
        self.device_index = 0
        self.streams = [Stream(self, d) for d in self.devices]
        self.current = dict(zip(self.devices, self.streams, strict=True))
        self.queries = self.pinned = self.uploaded = self.waits = 0
        self.recorded: list[tuple[int, Stream]] = []
        self.memory: list[torch.Tensor] = []  # nothing is freed, so that a late kernel reads no foreign memory
        self.pinned_memory: dict[int, torch.Tensor] = {}  # by the address of the storage

    def current_stream(self, device: torch.device | int | None = None) -> Stream:
        index = device.index if isinstance(device, torch.device) else device
        return self.current[self.devices[self.device_index if index is None else index]]

    def new_stream(self, index: int) -> Stream:
        self.streams.append(Stream(self, self.devices[index]))
        return self.streams[-1]

    def capturing_anywhere(self) -> bool:
        return any(stream.graph is not None for stream in self.streams)

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        before, self.device_index = self.device_index, device if isinstance(device, int) else device.index
        try:
            yield
        finally:
            self.device_index = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current[stream.device]
        with self.device(stream.device):
            self.current[stream.device] = stream
            try:
                yield
            finally:
                self.current[stream.device] = before

    @contextmanager
    def capture(self, *indices: int) -> Iterator[Graph]:
        """Capture what happens on devices, `torch.cuda.graph` for one of them. The first one becomes the current device."""
        self.run()
        graph = Graph(self)
        streams = [self.new_stream(i) for i in indices or (0,)]
        before = {stream.device: self.current[stream.device] for stream in streams}
        with self.device(streams[0].device):
            for stream in streams:
                stream.graph = graph
                self.current[stream.device] = stream
            try:
                yield graph
            finally:
                self.current.update(before)
                for stream in streams:
                    stream.graph = None

    def run(self, order: str = "first") -> None:
        """Execute everything that is queued.

        Args:
            order: which stream goes on while several can: the "first" or the "last" one, in the order of their creation.
        """
        self._run(self.streams if order == "first" else self.streams[::-1])
        assert not any(stream.queue for stream in self.streams), "streams wait for each other"

    def run_device(self, index: int) -> None:
        """Execute what is queued on one device, as far as it waits for no other device."""
        self._run([stream for stream in self.streams if stream.device.index == index])

    def _run(self, streams: list[Stream]) -> None:
        with _disable_current_modes():
            while ready := [s for s in streams if s.queue and (s.queue[0][0] != "wait" or s.queue[0][1][0])]:
                kind, what = ready[0].queue.popleft()
                if kind == "record":
                    what[0] = True
                elif kind == "call":
                    what()

    def launch(self, launch: Launch) -> None:
        """Queue a launch. All tensors have to be on the current device. On CPU tensors the kernel runs at once."""
        current = self.devices[self.device_index]
        places = {a.device for a in launch._arguments if isinstance(a, torch.Tensor)}
        arguments = [_raw(a) for a in launch._arguments]

        def call() -> None:
            with _disable_current_modes():
                launch._kernel[launch._grid](*arguments, **launch._constants, **launch._options)

        if not launch._grid[0]:
            return
        if places == {torch.device("cpu")}:
            call()
            return
        assert places == {current}, f"{launch.kernel_name} launched on {places} while {current} is the current device"
        self.current_stream().put("call", call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Execute a torch operation on the CPU at once, or queue it if it reads or writes the memory of a device."""
        fakes = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Pretended)]
        copies = func is torch.ops.aten.copy_.default
        place = args[0].device if copies else fakes[0].device if fakes else torch.device("cpu")
        if isinstance(kwargs.get("device"), torch.device):
            place = kwargs["device"]
            kwargs = {**kwargs, "device": torch.device("cpu") if place.type == "cuda" else place}
        raw_args, raw_kwargs = tree_map(_raw, args), tree_map(_raw, kwargs)
        if raw_kwargs.pop("pin_memory", False):
            return self._pin(func(*raw_args, **raw_kwargs))
        if place.type == "cuda":
            return self._on_device(func, args, raw_args, raw_kwargs, place, fakes)
        if copies and fakes and raw_args[0].data_ptr() in self.pinned_memory and raw_args[2:] == (True,):
            self.current_stream(fakes[0].device).put("call", lambda: func(*raw_args))
            return args[0]
        if fakes and place.type == "cpu":
            if kwargs.get("non_blocking"):
                return self._late(func, raw_args, raw_kwargs, fakes[0].device)
            self.waits += 1
            self.run()
        return func(*raw_args, **raw_kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        assert not self.capturing_anywhere(), "cudaHostAlloc during a capture"
        assert tensor.device.type == "cpu", f"pinned memory on {tensor.device}"
        self.pinned += 1
        self.pinned_memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _late(self, func: Any, raw_args: Any, kwargs: Any, device: torch.device) -> torch.Tensor:
        out: torch.Tensor = func(*raw_args, **kwargs)
        out.fill_(float("nan") if out.is_floating_point() else 1)
        self.current_stream(device).put("call", lambda: out.copy_(func(*raw_args, **kwargs)))
        return out

    def _on_device(
        self, func: Any, args: Any, raw_args: Any, kwargs: Any, place: torch.device, fakes: list[Pretended]
    ) -> Any:
        def wrap(out: Any) -> Any:
            return tree_map(lambda t: Pretended(t, place, self) if isinstance(t, torch.Tensor) else t, out)

        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            self.run()
            return func(*raw_args)
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        # torch takes the tensors of two lists in pairs, and those of one list one by one.
        lists_alone = "_foreach" in str(func) and not any(isinstance(a, Pretended) for a in args)
        assert copies or lists_alone or len({t.device for t in fakes}) < 2, f"{func} on tensors of several devices"
        if func.is_view or not (fakes or func is torch.ops.aten.copy_.default):
            return wrap(func(*raw_args, **kwargs))
        stream, others = self.current_stream(place), {self.current_stream(t.device) for t in fakes if t.device != place}
        for other in others:
            stream.wait_stream(other)
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            sources = [self._as_read(value) for value in args[1:]]
            stream.put("call", lambda: func(raw_args[0], *sources, **kwargs))
            result = args[0] if func._schema.returns else None
        else:
            out = func(*raw_args, **kwargs)
            result, outputs = wrap(out), [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]

            def again() -> None:
                new = [t for t in tree_flatten(func(*raw_args, **kwargs))[0] if isinstance(t, torch.Tensor)]
                for old, value in zip(outputs, new, strict=True):
                    old.copy_(value)

            stream.put("call", again)
        for other in others:
            other.wait_stream(stream)
        return result

    def _as_read(self, value: Any) -> Any:
        """Return what an operation reads: the host's pinned memory as it is later, its other memory as it is now."""
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
            return tree_map(_raw, value)
        if value.untyped_storage().data_ptr() not in self.pinned_memory:
            return value.clone()
        self.uploaded += value.numel()
        return value
