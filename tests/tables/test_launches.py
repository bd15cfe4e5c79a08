"""A step takes two launches, or four with clipping, for any number of groups. Tables without changes are not sent again."""

import pytest
import torch
from triton.runtime.jit import JITFunction

from lwadamw import AdamW, kernels
from lwadamw.tables import launch as launch_module
from lwadamw.tables import upload
from lwadamw.tables.launch import Launch
from tests.cases import make_params, set_grads


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    launched = []

    original = Launch.__call__

    def counted(self):
        launched.append(self.kernel_name)
        original(self)

    monkeypatch.setattr(Launch, "__call__", counted)
    return launched


@pytest.fixture
def uploads(monkeypatch):
    """One entry for each time that the dynamic table was sent."""
    sent = []
    original = upload.Upload.send
    monkeypatch.setattr(upload.Upload, "send", lambda self: (sent.append(1), original(self))[1])
    return sent


def _optimizer(n_groups, device, **options):
    params = make_params([(40,), (3, 5), (7,), (600,), (1,), (9, 9)], device)
    groups = [{"params": params[i::n_groups], "lr": 1e-3 * (i + 1)} for i in range(n_groups)]
    return params, AdamW(groups, backend="triton", **options)


@pytest.mark.parametrize("n_groups", [1, 2, 6])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_launches_do_not_depend_on_the_number_of_groups(n_groups, clip, launches, device):
    params, optimizer = _optimizer(n_groups, device, max_grad_norm=clip, amsgrad=n_groups == 2)
    for _ in range(2):
        set_grads(params)
        launches.clear()
        optimizer.step()
        assert len(launches) == (2 if clip is None else 4)


def test_mixed_amsgrad_shares_the_launch(launches, device):
    params = make_params([(40,), (50,)], device)
    optimizer = AdamW([{"params": params[:1], "amsgrad": True}, {"params": params[1:]}], backend="triton")
    set_grads(params)
    optimizer.step()
    assert launches == ["coefficients_kernel", "adamw_kernel"]
    assert "max_exp_avg_sq" not in optimizer.state[params[1]]


def test_the_table_is_sent_only_when_something_changed(uploads, device):
    params, optimizer = _optimizer(2, device)
    set_grads(params)
    optimizer.step()
    assert len(uploads) == 1
    optimizer.step()
    assert len(uploads) == 1, "same gradients, same hyperparameters"
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert len(uploads) == 2, "a gradient moved"
    optimizer.param_groups[1]["lr"] = 5e-4
    optimizer.step()
    assert len(uploads) == 3, "a learning rate changed"


@pytest.mark.parametrize("replaced", ["lr", "weight_decay", "both"])
def test_a_step_never_reads_the_device(replaced, monkeypatch, device):
    """The step calls nothing that waits for the device, such as `item()`.

    The case has clipping and a loss scale, and between two steps tensors replace numbers of the same value. Comparing the
    old number with the new tensor would read the tensor.
    """
    params, optimizer = _optimizer(3, device, max_grad_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=device), torch.tensor(0.0, device=device)
    set_grads(params)
    optimizer.step()
    for group in optimizer.param_groups:
        for key in ("lr", "weight_decay") if replaced == "both" else (replaced,):
            group[key] = torch.tensor(group[key], dtype=torch.float64, device=device)
    # Interpreted kernels read their arguments on the host, so no kernel runs here. The test is about the host code.
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    for name in ("item", "cpu", "tolist", "numpy", "__float__", "__bool__", "__int__", "__radd__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"step() called {name}"))
    for _ in range(2):
        set_grads(params)
        optimizer.step()


class _Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *values: self.calls.append((grid, values))


class _Kernel:
    """Stands for a `triton.jit` function, which specialises at each call and returns the compiled kernel."""

    arg_names = ("table", "n", "SECOND", "FIRST")

    def __init__(self, compiled):
        self.compiled, self.calls = compiled, []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self.compiled

        return call


def test_only_the_first_launch_specialises(monkeypatch):
    direct = []
    kernel, table = _Kernel(_Compiled(direct)), torch.zeros(3)
    launch = Launch(kernel, 7, (table, 5), {"FIRST": 1, "SECOND": 2}, {"num_warps": 8})
    monkeypatch.setattr(launch_module, "TAKES_CONSTANTS", True)
    for _ in range(3):
        launch()
    assert kernel.calls == [((7, 1, 1), (table, 5), {"FIRST": 1, "SECOND": 2, "num_warps": 8})]
    assert direct == [((7, 1, 1), (table.data_ptr(), 5, 2, 1))] * 2


def test_before_triton_3_3_compiled_kernels_take_no_constants(monkeypatch):
    direct = []
    launch = Launch(_Kernel(_Compiled(direct)), 7, (torch.zeros(3), 5), {"FIRST": 1, "SECOND": 2}, {})
    monkeypatch.setattr(launch_module, "TAKES_CONSTANTS", False)
    launch()
    launch()
    assert [len(values) for _, values in direct] == [2]


def test_an_interpreted_launch_is_repeated_and_an_empty_one_does_nothing():
    interpreted, empty = _Kernel(None), _Kernel(None)
    for kernel, programs in ((interpreted, 7), (empty, 0)):
        launch = Launch(kernel, programs, (torch.zeros(3), 5), {"FIRST": 1, "SECOND": 2}, {})
        launch()
        launch()
    assert len(interpreted.calls) == 2
    assert empty.calls == []


def test_constants_are_the_last_arguments_of_every_kernel():
    for name in kernels.__all__:
        if name.endswith("_kernel"):
            kinds = [p.is_constexpr for p in JITFunction(getattr(kernels, name).fn).params]
            assert kinds == sorted(kinds), name
