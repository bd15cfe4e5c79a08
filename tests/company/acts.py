"""Acts: what others do to an optimizer's tensors and groups between two steps. Each tells the float64 twin openly.

Every act takes a `World` and a `Held` parameter of it, or the place of a group.
"""

import copy
import io
import pickle
import warnings

import numpy as np
import torch

from lwadamw import AdamW
from lwadamw.state import keys
from lwadamw.state.storage import CODES
from tests.company.ledger import MOMENTS, half_ulp
from tests.company.storages import options_of, strides_of, weights

_STORAGE_KEYS = (keys.EXP_AVG_DTYPE, keys.EXP_AVG_SQ_DTYPE, keys.MASTER_WEIGHTS, keys.ROUNDING)


@torch.no_grad()
def write(world, held, data=False, share=1.0):
    """New values for a share of the elements, in place or through `.data`."""
    values = weights(held.p.shape, held.p.dtype)
    where = torch.rand(held.p.shape) < share
    (held.p.data if data else held.p).copy_(torch.where(where, values, held.p))
    held.twin.write(values.double().numpy(), where.numpy(), world.storage(held))


@torch.no_grad()
def mask(world, held, share=0.5, data=False):
    """Multiply by a mask, as pruning does. share=1: the whole parameter becomes 0."""
    where = torch.rand(held.p.shape) < share
    (held.p.data if data else held.p).mul_((~where).to(held.p.dtype))
    held.twin.write(0.0, where.numpy(), world.storage(held))


@torch.no_grad()
def zero(world, held):
    """Set the parameter to 0."""
    held.p.zero_()
    held.twin.write(0.0, np.ones(held.p.shape, bool), world.storage(held))


@torch.no_grad()
def halve(world, held):
    """Multiply by 1/2 in place."""
    held.p.mul_(0.5)
    held.twin.scale(0.5, world.storage(held))


@torch.no_grad()
def swap(world, held, data=False):
    """Swap averaged weights in, look at them, and swap the weights back. The digits of the weight stay."""
    target, old = (held.p.data if data else held.p), held.p.detach().clone()
    target.copy_(weights(held.p.shape, held.p.dtype))
    target.copy_(old)


def replace_data(world, held, layout="rows", shift=0):
    """Move the parameter to other memory, in another layout. Nobody may write to the old memory any more.

    Without a layout, the strides stay as they are.
    """
    old = held.p.data
    held.p.data = world.guards.copy(old, strides_of(old.shape, layout) if layout else old.stride(), shift)
    world.guards.freeze(old)
    held.p.grad = None


def flatten(world, some, gap=0):
    """Make the parameters views of one new flat buffer, as FSDP and DeepSpeed do."""
    total = sum(h.p.numel() + gap for h in some)
    flat, begin = world.guards.empty((total,), some[0].p.dtype, shift=1), 0
    for h in some:
        old = h.p.data
        view = flat[begin : begin + old.numel()].view(old.shape)
        begin += old.numel() + gap
        h.p.data = view.copy_(old)
        world.guards.freeze(old)
        h.p.grad = None


def transpose(world, held):
    """View a square parameter the other way round, at the same address. The moments stay where they are, by index."""
    held.p.data = held.p.data.t()
    held.p.grad = None
    storage, twin = world.storage(held), held.twin
    rest = half_ulp(abs(twin.reference.value) + twin.error["value"], held.p.dtype)
    twin.reference.value, twin.error["value"] = twin.reference.value.T.copy(), twin.error["value"].T.copy()
    if storage.companion:
        twin.error["value"] = twin.error["value"] + 2.02 * rest.T + twin.compensation


def freeze(world, held, frozen=True):
    """Freeze the parameter, or unfreeze it."""
    held.p.requires_grad_(not frozen)
    if frozen:
        world.give(held, None)


def take_out(world, held, new_list=False):
    """Take the parameter, and its name if it has one, out of its group."""
    group = world.optimizer.param_groups[held.place]
    i = next(i for i, p in enumerate(group["params"]) if p is held.p)
    for key in ("params", "param_names"):
        if key in group:
            rest = group[key][:i] + group[key][i + 1 :]
            if new_list:
                group[key] = rest
            else:
                group[key][:] = rest
    world.place(held, None)


def put_in(world, held, place, front=False):
    """Put a parameter that is in no group into a group."""
    group = world.optimizer.param_groups[place]
    group["params"].insert(0 if front else len(group["params"]), held.p)
    if "param_names" in group:
        group["param_names"].insert(0 if front else len(group["param_names"]), held.name)
    world.place(held, place)


def reorder(world, place):
    """Reverse the order of the parameters of a group, and of their names."""
    group = world.optimizer.param_groups[place]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = group[key][::-1]


def assign(world, place, key, value, tensor=False):
    """Assign a hyperparameter, as a number or as a tensor."""
    world.optimizer.param_groups[place][key] = torch.tensor(value, dtype=torch.float64) if tensor else value
    world.set(place, **{key: value})


def edit_betas(world, place, betas):
    """Edit the betas in place, in a list that the group holds already."""
    group = world.optimizer.param_groups[place]
    assert isinstance(group["betas"], list)
    group["betas"][:] = betas
    world.set(place, betas=tuple(betas))


def copy_optimizer(world, how):
    """Go on with a deepcopy or a pickle of the optimizer. The original may not be written any more."""
    old = world.optimizer
    new = copy.deepcopy(old) if how == "deepcopy" else pickle.loads(pickle.dumps(old))
    _go_on(world, old, new)


def _go_on(world, old, new):
    pairs = [*zip(old.state, new.state, strict=True)]
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        pairs += zip(before["params"], after["params"], strict=True)
    after = {id(p): q for p, q in pairs}
    for h in world.held:
        if id(h.p) in after:
            for tensor in (h.p, *old.state.get(h.p, {}).values()):
                world.guards.freeze(tensor)
            h.p = after[id(h.p)]
    world.optimizer = new


def reload(world, shuffle=False, through_file=False, **other):
    """Go on with a new optimizer that has loaded the state of the old one.

    Args:
        world: the world. Parameters that are in no group have no state.
        shuffle: the groups of the new optimizer have another order of parameters. They are matched by name.
        through_file: torch.save and torch.load lie between.
        other: storage options of the new groups that differ.
    """
    old = world.optimizer
    saved = old.state_dict()
    if through_file:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    groups = []
    for group in old.param_groups:
        params = (
            list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]
        )
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**rest, "params": params[::-1] if shuffle else list(params), "lr": 1.0, **other})
    world.optimizer = AdamW(groups, **world.arguments)
    world.optimizer.max_grad_norm = world.max_grad_norm
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="load_state_dict: state is used as it was saved")
        world.optimizer.load_state_dict(saved)


def delete_state(world, held, by="pop"):
    """Delete the state of a parameter, or the whole of it."""
    some = world.held if by == "all" else [held]
    for h in some:
        h.twin.forget(world.storage(h))
    if by == "pop":
        world.optimizer.state.pop(held.p, None)
    elif by == "clear":
        world.optimizer.state[held.p].clear()
    else:
        world.optimizer.state.clear()


@torch.no_grad()
def edit_moment(world, held, key, how):
    """Give a moment new values: "zero" and "copy" in place, "replace" by a new tensor.

    A second moment does not become 0, because the next update would then be a first moment divided by eps.
    """
    state = world.optimizer.state[held.p]
    if state[key].dtype == torch.uint8:
        return
    if (how == "zero" and key == "exp_avg") or state[key].dtype in CODES:
        state[key].zero_()
        held.twin.set_moment(key, 0.0)
        return
    values = (torch.rand(held.p.shape) + 0.5).to(state[key].dtype)
    if how == "copy":
        state[key].copy_(values)
    else:
        world.guards.freeze(state[key])
        state[key] = world.guards.copy(values, shift=1)
    held.twin.set_moment(key, values.double().numpy())


def convert(world, place, combination):
    """Ask for other storage in a group, and convert all state."""
    group, old = world.optimizer.param_groups[place], {id(h): world.storage(h) for h in world.held}
    wanted = options_of(combination)
    for key in _STORAGE_KEYS:
        if key.name in group or key.name in wanted:
            group[key.name] = wanted.get(key.name, key.default)
    world.optimizer.convert_state()
    for h in world.held:
        if h.place is not None and world.optimizer.state.get(h.p):
            h.twin.convert(world.storage(h), old[id(h)])


def set_clip(world, value):
    """Set the norm to clip to, or None."""
    world.optimizer.max_grad_norm = world.max_grad_norm = value


def has_moments(world, held):
    """Return the moments that the state of a parameter has."""
    return [key for key in MOMENTS if key in world.optimizer.state.get(held.p, {})]
