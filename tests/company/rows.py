"""Rows of the table in docs/company.md: what others may do between two steps, and what is promised about it."""

import torch

from tests.company import acts, deeds
from tests.company.cell import FOLLOWED, NOT_SEEN, REFUSED, Row
from tests.company.storages import LARGE, B, F, H


def _always(outcome):
    return lambda backend, column: outcome


def _two(column):
    """The shapes of two parameters. The second one is the one of the column."""
    return ((3,), (64, 64) if column == "8-bit" else (5, 7))


def _half_outcome(backend, column):
    return REFUSED if column in ("remainder", "kahan", "stochastic", "8-bit") else FOLLOWED


_follow, _refuse = _always(FOLLOWED), _always(REFUSED)

ROWS = (
    Row("write in place", lambda c: acts.write(c.world, c.held), _follow),
    Row("load weights into the model", deeds.load_weights, _follow),
    Row("write through `.data`", lambda c: acts.write(c.world, c.held, data=True), _follow),
    Row("set to zero", lambda c: acts.zero(c.world, c.held), _follow),
    Row("prune with a mask", lambda c: acts.mask(c.world, c.held), _follow),
    Row("swap averaged weights in and out", lambda c: acts.swap(c.world, c.held), _follow),
    Row("replace `.data`", lambda c: acts.replace_data(c.world, c.held, shift=1), _follow),
    Row(
        "replace `.data` in another memory layout",
        deeds.replace_layout,
        lambda backend, column: REFUSED if column == "8-bit" else FOLLOWED,
        match="'w0' .*exp_avg_scale has shape .* needs",
        shapes=lambda column: (LARGE,) if column == "8-bit" else ((6, 6),),
    ),
    Row("re-view into a flat buffer", lambda c: acts.flatten(c.world, c.world.held, 1), _follow),
    Row(
        "view in another way at the same address",
        lambda c: acts.transpose(c.world, c.held),
        _follow,
    ),
    Row("cut rows", deeds.cut, _refuse, match="of 'w0' has shape .*, the parameter"),
    Row("add rows", deeds.grow, _refuse, match="of 'w0' has shape .*, the parameter"),
    Row("change the dtype to float32", deeds.change_dtype(F), _follow),
    Row("change the dtype to bfloat16", deeds.change_dtype(B), _follow),
    Row(
        "change the dtype to float16",
        deeds.change_dtype(H),
        _half_outcome,
        match="'w0'",
        error=(RuntimeError, ValueError),
    ),
    Row("move to another device", deeds.to_meta, _refuse, match="meta"),
    Row("tie", deeds.tie, _always(NOT_SEEN), shapes=_two),
    Row("untie", deeds.untie, _always(NOT_SEEN)),
    Row("freeze", lambda c: acts.freeze(c.world, c.held), _follow),
    Row("unfreeze", deeds.unfreeze, _follow),
    Row('filter `group["params"]`', lambda c: acts.take_out(c.world, c.held), _follow, shapes=_two),
    Row('filter `group["params"]`, leave the names', deeds.filter_alone, _follow, shapes=_two),
    Row('append to `group["params"]`', deeds.append, _follow, shapes=_two),
    Row("duplicate a parameter in its group", deeds.duplicate, _follow),
    Row(
        "put a parameter into two groups",
        deeds.two_groups,
        _refuse,
        match="w0",
        error=(ValueError, RuntimeError),
    ),
    Row("assign a hyperparameter", lambda c: acts.assign(c.world, 0, "lr", 0.1), _follow),
    Row(
        "edit a list inside a group in place",
        lambda c: acts.edit_betas(c.world, 0, [0.5, 0.75]),
        _follow,
    ),
    Row("set `grad_dtype`", deeds.grad_dtype, _follow),
    Row(
        "hand in `main_grad` of another shape",
        deeds.other_shape,
        _refuse,
        match="w0",
        options={"grad_attribute": "main_grad"},
    ),
    Row("hand in a sparse gradient", deeds.sparse, _refuse, match="sparse gradients: the gradient of 'w0'"),
    Row("delete state", deeds.delete, _follow),
    Row("edit state in place", deeds.state_edit("copy"), _follow),
    Row("replace state tensors", deeds.state_edit("replace"), _follow),
    Row("give state another shape", deeds.wrong_state, _refuse, match="exp_avg of 'w0' has shape"),
    Row("load state of another storage", deeds.load_other, _follow),
    Row("convert state", deeds.convert, _follow),
    Row("deepcopy the optimizer", lambda c: acts.copy_optimizer(c.world, "deepcopy"), _follow),
    Row("pickle the optimizer", lambda c: acts.copy_optimizer(c.world, "pickle"), _follow),
    Row("change the default dtype", deeds.under(deeds.float64), _follow),
    Row("change the default device", deeds.under(lambda: torch.device("meta")), _follow),
    Row(
        "step under FakeTensorMode",
        deeds.fake_mode,
        _refuse,
    ),
    Row("step in inference mode", deeds.under(torch.inference_mode), _follow),
    Row("step on another thread", deeds.in_thread, _follow),
)
