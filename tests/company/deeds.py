"""Deeds: acts of others that only the table of docs/company.md has. Each takes a `Cell`, and may return the next step."""

import contextlib
import threading

import torch

from tests.company import acts
from tests.company.storages import B, F, gradient, weights


def replace_layout(cell):
    acts.replace_data(cell.world, cell.held, "columns")


def cut(cell):
    cell.held.p.data = cell.held.p.data[:4]


def grow(cell):
    cell.held.p.data = torch.cat([cell.held.p.data, cell.held.p.data])


def change_dtype(dtype):
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


def to_meta(cell):
    with torch.no_grad():
        there = torch.nn.Parameter(torch.empty_like(cell.held.p, device="meta"))
        torch.utils.swap_tensors(cell.held.p, there)
    cell.held.p.grad = torch.empty_like(cell.held.p)


def tie(cell):
    """The model uses the first parameter in both places. The second one gets no gradient any more."""
    acts.freeze(cell.world, cell.world.held[1])


def untie(cell):
    """The model has a new parameter of its own, which the optimizer has never heard of."""
    new = torch.nn.Parameter(cell.held.p.detach().clone())
    new.grad = torch.ones_like(new)
    old = new.detach().clone()

    def step():
        cell.give_all()
        cell.world.step()
        assert torch.equal(new, old)

    return step


def unfreeze(cell):
    acts.freeze(cell.world, cell.held)
    cell.world.step()
    acts.freeze(cell.world, cell.held, frozen=False)


def filter_alone(cell):
    """The names are left as they are."""
    group = cell.world.optimizer.param_groups[0]
    group["params"] = group["params"][1:]
    cell.world.place(cell.held, None)

    def step():
        cell.give_all()
        cell.world.step()
        assert cell.world.optimizer.norms().names == ("w1",)

    return step


def append(cell):
    acts.take_out(cell.world, cell.held)
    acts.put_in(cell.world, cell.held, 0)


def duplicate(cell):
    group = cell.world.optimizer.param_groups[0]
    for key, value in (("params", cell.held.p), ("param_names", cell.held.name)):
        group[key].append(value)


def two_groups(cell):
    group = cell.world.optimizer.param_groups[0]
    names = {"param_names": [cell.held.name]}
    cell.world.optimizer.param_groups.append({**group, "params": [cell.held.p], **names})


def grad_dtype(cell):
    cell.held.p.grad_dtype = None
    cell.world.give(cell.held, gradient(cell.held.p.shape, B if cell.dtype == F else F))
    return cell.world.step


def other_shape(cell):
    cell.held.p.main_grad = torch.ones(3, 3, dtype=cell.dtype)


def sparse(cell):
    cell.held.p.grad = torch.ones_like(cell.held.p).detach().to_sparse()


def wrong_state(cell):
    cell.world.optimizer.state[cell.held.p]["exp_avg"] = torch.zeros(7)


def load_other(cell):
    acts.reload(cell.world, exp_avg_dtype=B, exp_avg_sq_dtype=B)


def convert(cell):
    group = cell.world.optimizer.param_groups[0]
    old = cell.world.storage(cell.held)
    group["exp_avg_dtype"] = group["exp_avg_sq_dtype"] = B
    cell.world.optimizer.convert_state()
    cell.held.twin.convert(cell.world.storage(cell.held), old)


@contextlib.contextmanager
def float64():
    try:
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def under(context):
    """State is created, and the step is taken, in a context."""

    def act(cell):
        acts.delete_state(cell.world, cell.held)
        cell.world.around = context

    return act


def delete(cell):
    acts.delete_state(cell.world, cell.held)


def fake_mode(cell):
    """Real parameters under a FakeTensorMode. Afterwards the optimizer goes on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cell.give_all()

    def step():
        def fake_step():
            with FakeTensorMode():
                cell.world.optimizer.step()

        cell.world.assert_refused("under FakeTensorMode, but .* is a real tensor", act=fake_step)
        cell.world.step()

    return step


def in_thread(cell):
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


def load_weights(cell):
    """As `Module.load_state_dict` does."""
    module = torch.nn.Module()
    module.w = cell.held.p
    values = weights(cell.held.p.shape, cell.dtype)
    module.load_state_dict({"w": values})
    where = torch.ones(values.shape, dtype=torch.bool).numpy()
    cell.held.twin.write(values.double().numpy(), where, cell.world.storage(cell.held))


def state_edit(how):
    return lambda cell: (
        [acts.edit_moment(cell.world, cell.held, key, how) for key in ("exp_avg", "exp_avg_sq")] and None
    )
