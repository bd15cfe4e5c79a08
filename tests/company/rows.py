"""Rows of the table in docs/company.md: what others may do between two steps, and what is promised about it."""

import torch

from tests.company import acts, deeds
from tests.company.cell import FOLLOWED, NOT_SEEN, REFUSED, Row
from tests.company.storages import LARGE, B, F, H

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


def _half_outcome(backend, column):
    return REFUSED if column in ("remainder", "kahan", "stochastic", "8-bit") else FOLLOWED


def _companion(backend, column):
    waits = column in ("fp32 master", "remainder", "8-bit") or (backend, column) == ("triton", "kahan")
    return "companion dtype" if waits else None


def _half_done(backend, column):
    return "checks on torch" if backend == "torch" and column in ("plain bf16", "stochastic") else None


def _draws(backend, column):
    return "default device" if backend == "torch" and column in ("stochastic", "8-bit") else None


def _grown(backend, column):
    return "same address" if backend == "torch" and column != "plain fp32" else None


def _master_data(backend, column):
    return "data write" if (backend, column) == ("triton", "fp32 master") else None


_follow, _refuse = _always(FOLLOWED), _always(REFUSED)

ROWS = (
    Row("write in place", lambda c: acts.write(c.world, c.held), _follow),
    Row("load weights into the model", deeds.load_weights, _follow),
    Row("write through `.data`", lambda c: acts.write(c.world, c.held, data=True), _follow, pending=_master_data),
    Row("set to zero", lambda c: acts.zero(c.world, c.held), _follow, pending=_if_remainder("remainder zero")),
    Row("prune with a mask", lambda c: acts.mask(c.world, c.held), _follow, pending=_if_remainder("remainder zero")),
    Row("swap averaged weights in and out", lambda c: acts.swap(c.world, c.held), _follow),
    Row("replace `.data`", lambda c: acts.replace_data(c.world, c.held, shift=1), _follow),
    Row(
        "replace `.data` in another memory layout",
        deeds.replace_layout,
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
    Row("cut rows", deeds.cut, _refuse, match="of 'w0' has shape .*, the parameter", pending=_always("same address")),
    Row("add rows", deeds.grow, _refuse, match="of 'w0' has shape .*, the parameter", pending=_grown),
    Row("change the dtype to float32", deeds.change_dtype(F), _follow, pending=_companion),
    Row("change the dtype to bfloat16", deeds.change_dtype(B), _follow),
    Row(
        "change the dtype to float16",
        deeds.change_dtype(H),
        _half_outcome,
        match="'w0'",
        error=(RuntimeError, ValueError),
        pending=lambda b, c: "companion dtype" if _half_outcome(b, c) == REFUSED else None,
    ),
    Row("move to another device", deeds.to_meta, _refuse, match="meta", pending=_half_done),
    Row("tie", deeds.tie, _always(NOT_SEEN), shapes=_two),
    Row("untie", deeds.untie, _always(NOT_SEEN)),
    Row("freeze", lambda c: acts.freeze(c.world, c.held), _follow),
    Row("unfreeze", deeds.unfreeze, _follow),
    Row('filter `group["params"]`', lambda c: acts.take_out(c.world, c.held), _follow, shapes=_two),
    Row(
        'filter `group["params"]`, leave the names', deeds.filter_alone, _follow, shapes=_two, pending=_always("names")
    ),
    Row('append to `group["params"]`', deeds.append, _follow, shapes=_two),
    Row("duplicate a parameter in its group", deeds.duplicate, _follow, pending=_always("duplicates")),
    Row(
        "put a parameter into two groups",
        deeds.two_groups,
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
    Row("set `grad_dtype`", deeds.grad_dtype, _follow, pending=_if_triton("grad_dtype")),
    Row(
        "hand in `main_grad` of another shape",
        deeds.other_shape,
        _refuse,
        match="w0",
        options={"grad_attribute": "main_grad"},
        pending=_always("main_grad shape"),
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
    Row("change the default device", deeds.under(lambda: torch.device("meta")), _follow, pending=_draws),
    Row(
        "step under FakeTensorMode",
        deeds.fake_mode,
        _refuse,
        pending=lambda b, c: "checks on torch" if (b, c) == ("torch", "plain bf16") else None,
    ),
    Row("step in inference mode", deeds.under(torch.inference_mode), _follow),
    Row("step on another thread", deeds.in_thread, _follow),
)
