"""Rows of the table in docs/company.md: what others may do between two steps, and what is promised about it."""

import contextlib
import threading

import torch

from tests.company import acts
from tests.company.cell import FOLLOWED, NOT_SEEN, REFUSED, Row
from tests.company.storages import LARGE, B, F, H, gradient, weights

_PACKED = ("remainder", "kahan", "stochastic", "8-bit")  # torch's implementations cannot store these


def _always(outcome):
    return lambda backend, column: outcome


def _two(column):
    """The shapes of two parameters. The second one is the one of the column."""
    return ((3,), (64, 64) if column == "8-bit" else (5, 7))


def _if_remainder(what):
    return lambda backend, column: what if column in ("remainder", "8-bit") else None


def _if_triton(what):
    return lambda backend, column: what if backend == "triton" else None


def _replace_layout(cell):
    acts.replace_data(cell.world, cell.held, "columns")


def _cut(cell):
    cell.held.p.data = cell.held.p.data[:4]


def _grow(cell):
    cell.held.p.data = torch.cat([cell.held.p.data, cell.held.p.data])


def _change_dtype(dtype):
    def act(cell):
        held = cell.held
        old, storage = held.p.data, cell.world.storage(held)
        held.p.data = cell.world.guards.copy(old.to(dtype))
        cell.world.guards.freeze(old)
        cell.clear()
        if dtype != F and storage.param != dtype:
            held.twin.round_to(dtype)
            if storage.companion:  # the cast counts as a write: the digits of the master weight are lost
                held.twin.round_to(storage.param)

    return act


def _to_meta(cell):
    with torch.no_grad():
        there = torch.nn.Parameter(torch.empty_like(cell.held.p, device="meta"))
        torch.utils.swap_tensors(cell.held.p, there)
    cell.held.p.grad = torch.empty_like(cell.held.p)


def _tie(cell):
    """The model uses the first parameter in both places. The second one gets no gradient any more."""
    acts.freeze(cell.world, cell.world.held[1])


def _untie(cell):
    """The model has a new parameter of its own, which the optimizer has never heard of."""
    new = torch.nn.Parameter(cell.held.p.detach().clone())
    new.grad = torch.ones_like(new)
    old = new.detach().clone()

    def step():
        cell.give_all()
        cell.world.step()
        assert torch.equal(new, old)

    return step


def _unfreeze(cell):
    acts.freeze(cell.world, cell.held)
    cell.world.step()
    acts.freeze(cell.world, cell.held, frozen=False)


def _filter_alone(cell):
    """The names are left as they are."""
    group = cell.world.optimizer.param_groups[0]
    group["params"] = group["params"][1:]
    cell.world.place(cell.held, None)

    def step():
        cell.give_all()
        cell.world.step()
        assert cell.world.optimizer.norms().names == ("w1",)

    return step


def _append(cell):
    acts.take_out(cell.world, cell.held)
    acts.put_in(cell.world, cell.held, 0)


def _duplicate(cell):
    group = cell.world.optimizer.param_groups[0]
    for key, value in (("params", cell.held.p), ("param_names", cell.held.name)):
        group[key].append(value)


def _two_groups(cell):
    group = cell.world.optimizer.param_groups[0]
    names = {"param_names": [cell.held.name]}
    cell.world.optimizer.param_groups.append({**group, "params": [cell.held.p], **names})


def _grad_dtype(cell):
    cell.held.p.grad_dtype = None
    cell.world.give(cell.held, gradient(cell.held.p.shape, B if cell.dtype == F else F))
    return cell.world.step


def _other_shape(cell):
    cell.held.p.main_grad = torch.ones(3, 3, dtype=cell.dtype)


def _sparse(cell):
    cell.held.p.grad = torch.ones_like(cell.held.p).detach().to_sparse()


def _wrong_state(cell):
    cell.world.optimizer.state[cell.held.p]["exp_avg"] = torch.zeros(7)


def _load_other(cell):
    acts.reload(cell.world, exp_avg_dtype=B, exp_avg_sq_dtype=B)


def _convert(cell):
    group = cell.world.optimizer.param_groups[0]
    old = cell.world.storage(cell.held)
    group["exp_avg_dtype"] = group["exp_avg_sq_dtype"] = B
    cell.world.optimizer.convert_state()
    cell.held.twin.convert(cell.world.storage(cell.held), old)


@contextlib.contextmanager
def _float64():
    try:
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _under(context):
    """State is created, and the step is taken, in a context."""

    def act(cell):
        acts.delete_state(cell.world, cell.held)
        cell.world.around = context

    return act


def _delete(cell):
    acts.delete_state(cell.world, cell.held)


def _fake_mode(cell):
    """Real parameters under a FakeTensorMode. Afterwards the optimizer goes on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cell.give_all()

    def step():
        def fake_step():
            with FakeTensorMode():
                cell.world.optimizer.step()

        cell.world.assert_refused("convert all Tensors to FakeTensors", AssertionError, fake_step)
        cell.world.step()

    return step


def _in_thread(cell):
    cell.give_all()

    def step():
        failed = []

        def work():
            try:
                cell.world.step()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failed, failed

    return step


def _load_weights(cell):
    """As `Module.load_state_dict` does."""
    module = torch.nn.Module()
    module.w = cell.held.p
    values = weights(cell.held.p.shape, cell.dtype)
    module.load_state_dict({"w": values})
    where = torch.ones(values.shape, dtype=torch.bool).numpy()
    cell.held.twin.write(values.double().numpy(), where, cell.world.storage(cell.held))


def _half_outcome(backend, column):
    return REFUSED if column in ("remainder", "kahan", "8-bit") else FOLLOWED


def _state_edit(how):
    return lambda cell: (
        [acts.edit_moment(cell.world, cell.held, key, how) for key in ("exp_avg", "exp_avg_sq")] and None
    )


def _companion(backend, column):
    waits = column in ("fp32 master", "remainder", "8-bit") or (backend, column) == ("triton", "kahan")
    return "companion dtype" if waits else None


def _half_done(backend, column):
    return "checks on torch" if backend == "torch" and column in ("plain bf16", "stochastic") else None


def _draws(backend, column):
    return "default device" if backend == "torch" and column in ("stochastic", "8-bit") else None


def _grown(backend, column):
    return "same address" if backend == "torch" and column != "plain fp32" else None


_follow, _refuse = _always(FOLLOWED), _always(REFUSED)
_master_data = lambda backend, column: "data write" if (backend, column) == ("triton", "fp32 master") else None  # noqa: E731

ROWS = (
    Row("write in place", lambda c: acts.write(c.world, c.held), _follow),
    Row("load weights into the model", _load_weights, _follow),
    Row("write through `.data`", lambda c: acts.write(c.world, c.held, data=True), _follow, pending=_master_data),
    Row("set to zero", lambda c: acts.zero(c.world, c.held), _follow, pending=_if_remainder("remainder zero")),
    Row("prune with a mask", lambda c: acts.mask(c.world, c.held), _follow, pending=_if_remainder("remainder zero")),
    Row("swap averaged weights in and out", lambda c: acts.swap(c.world, c.held), _follow),
    Row("replace `.data`", lambda c: acts.replace_data(c.world, c.held, shift=1), _follow),
    Row(
        "replace `.data` in another memory layout",
        _replace_layout,
        lambda backend, column: REFUSED if column == "8-bit" else FOLLOWED,
        match="exp_avg_scale of 'w0' .* needs",
        shapes=lambda column: (LARGE,) if column == "8-bit" else ((6, 6),),
        pending=lambda b, c: "packed layout" if b == "torch" and c in _PACKED else None,
    ),
    Row("re-view into a flat buffer", lambda c: acts.flatten(c.world, c.world.held, 1), _follow),
    Row(
        "view in another way at the same address",
        lambda c: acts.transpose(c.world, c.held),
        _follow,
        pending=lambda b, c: "same address" if b == "triton" or c in _PACKED else None,
    ),
    Row("cut rows", _cut, _refuse, match="of 'w0' has shape .*, the parameter", pending=_always("same address")),
    Row("add rows", _grow, _refuse, match="of 'w0' has shape .*, the parameter", pending=_grown),
    Row("change the dtype to float32", _change_dtype(F), _follow, pending=_companion),
    Row("change the dtype to bfloat16", _change_dtype(B), _follow),
    Row(
        "change the dtype to float16",
        _change_dtype(H),
        _half_outcome,
        match="'w0'",
        pending=lambda b, c: "companion dtype" if _half_outcome(b, c) == REFUSED else None,
    ),
    Row("move to another device", _to_meta, _refuse, match="meta", pending=lambda b, c: _half_done(b, c)),
    Row("tie", _tie, _always(NOT_SEEN), shapes=_two),
    Row("untie", _untie, _always(NOT_SEEN)),
    Row("freeze", lambda c: acts.freeze(c.world, c.held), _follow),
    Row("unfreeze", _unfreeze, _follow),
    Row('filter `group["params"]`', lambda c: acts.take_out(c.world, c.held), _follow, shapes=_two),
    Row('filter `group["params"]`, leave the names', _filter_alone, _follow, shapes=_two, pending=_always("names")),
    Row('append to `group["params"]`', _append, _follow, shapes=_two),
    Row("duplicate a parameter in its group", _duplicate, _follow, pending=_always("duplicates")),
    Row(
        "put a parameter into two groups",
        _two_groups,
        _refuse,
        match="w0",
        error=(ValueError, RuntimeError),
        pending=_always("duplicates"),
    ),
    Row("assign a hyperparameter", lambda c: acts.assign(c.world, 0, "lr", 0.1), _follow),
    Row(
        "edit a list inside a group in place",
        lambda c: acts.edit_betas(c.world, 0, [0.5, 0.75]),
        _follow,
        pending=lambda b, c: "list in place" if b == "triton" or c == "plain fp32" else None,
    ),
    Row("set `grad_dtype`", _grad_dtype, _follow, pending=_if_triton("grad_dtype")),
    Row(
        "hand in `main_grad` of another shape",
        _other_shape,
        _refuse,
        match="w0",
        options={"grad_attribute": "main_grad"},
        pending=_always("main_grad shape"),
    ),
    Row("hand in a sparse gradient", _sparse, _refuse, match="sparse gradients: the gradient of 'w0'"),
    Row("delete state", _delete, _follow),
    Row("edit state in place", _state_edit("copy"), _follow),
    Row("replace state tensors", _state_edit("replace"), _follow),
    Row("give state another shape", _wrong_state, _refuse, match="exp_avg of 'w0' has shape"),
    Row("load state of another storage", _load_other, _follow),
    Row("convert state", _convert, _follow),
    Row("deepcopy the optimizer", lambda c: acts.copy_optimizer(c.world, "deepcopy"), _follow),
    Row("pickle the optimizer", lambda c: acts.copy_optimizer(c.world, "pickle"), _follow),
    Row("change the default dtype", _under(_float64), _follow),
    Row("change the default device", _under(lambda: torch.device("meta")), _follow, pending=_draws),
    Row(
        "step under FakeTensorMode",
        _fake_mode,
        _refuse,
        pending=lambda b, c: "checks on torch" if (b, c) == ("torch", "plain bf16") else None,
    ),
    Row("step in inference mode", _under(torch.inference_mode), _follow),
    Row("step on another thread", _in_thread, _follow),
)
