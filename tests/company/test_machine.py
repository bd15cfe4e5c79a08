"""A random company: whatever others do between steps, weights and moments stay within float64 bounds, and no canary is touched.

`COMPANY_EXAMPLES=5000 pytest -m slow tests/company/test_machine.py` runs more examples, with larger parameters.
"""

import functools
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from lwadamw.state.combinations import COMBINATIONS
from tests.company import acts
from tests.company.pending import PENDING
from tests.company.storages import LARGE, LAYOUTS, SMALL, B, D, F, H, dtypes_of, gradient, options_of, weights
from tests.company.world import World

_ANY = st.integers(0, 5)  # a parameter or a group, modulo how many there are
_NUMBERS = {
    "lr": (1e-3, 1e-2, 0.1, 0.0),
    "weight_decay": (0.0, 0.1, 1.0),
    "eps": (1e-8, 1e-4),
    "betas": ((0.9, 0.999), (0.9, 0.95), (0.5, 0.8), (0.0, 0.5)),
    "maximize": (False, True),
}


def _act(**strategies):
    """Make a rule of an act, which a step may follow at once."""

    def decorate(act):
        @functools.wraps(act)
        def act_and_step(self, then_step, **values):
            act(self, **values)
            if then_step:
                self._step([True] * len(self.world.held), True, 1.0)

        return rule(then_step=st.booleans(), **strategies)(act_and_step)

    return decorate


class Company(RuleBasedStateMachine):
    """An optimizer among others."""

    backend = "torch"
    thorough = False
    steps = 10**9  # how many steps may stand between the first one and the last one

    def __init__(self):
        super().__init__()
        self.world, self.kinds, self.made, self.cleared = None, [], 0, False

    @initialize(
        seed=st.integers(0, 2**16),
        groups=st.lists(st.sampled_from(list(COMBINATIONS)), min_size=1, max_size=2),
        clip=st.sampled_from([None, None, 1.0]),
        named=st.booleans(),
        guard_state=st.booleans(),
    )
    def build(self, seed, groups, clip, named, guard_state):
        torch.manual_seed(seed)
        self.short = self.backend == "triton" and not self.thorough
        if self.short:  # the interpreter takes about 35 ms for each parameter
            self.steps = _pick([0, 0, 0, 1])
            groups = groups[: _pick([1, 1, 2])]
        self.named = named
        self.world = World(self.backend, max_grad_norm=clip)
        self.world.guard_state = guard_state
        for i, combination in enumerate(groups):
            self._group(combination, 1 if self.short else 1 + (seed >> i) % 3)
        if _pick([False, True, True, True]):
            self.steps += 1
            self._step([True] * len(self.world.held), True, 1.0)

    def _group(self, combination, n):
        """Add a group of n random parameters."""
        world, options = self.world, {k: _pick(values) for k, values in _NUMBERS.items()}
        options["amsgrad"] = _pick([False, False, True]) and "8-bit" not in combination
        if _pick([False, True]):
            options |= {"width_lr_mult": 0.25, "width_wd_mult": 2.0, "width_eps_mult": 0.5}
        if _pick([False, False, True]):
            options["grad_attribute"] = "main_grad"
        params = []
        for _ in range(n):
            dtype = _pick(dtypes_of(combination, self.backend))
            if dtype == H and self.backend == "torch" and not options_of(combination) and "fp16 torch" in PENDING:
                dtype = F
            large = "8-bit" in combination and (self.thorough or _pick([self.backend == "torch", False]))
            shape = LARGE if large else _pick(SMALL)
            layout = "rows" if large else _pick(LAYOUTS if self.backend == "torch" else LAYOUTS[:-1])
            params.append((f"w{self.made}", world.parameter(weights(shape, dtype), layout, _pick([0, 1, 3, 8]))))
            self.made += 1
        world.add_group(params if self.named else [p for _, p in params], **options, **options_of(combination))
        self.kinds.append(combination)

    def _held(self, i):
        return self.world.held[i % len(self.world.held)]

    def _place(self, i):
        return i % len(self.kinds)

    # Steps

    @rule(norms=st.booleans(), size=st.sampled_from([1.0, 1.0, 0.25, 8.0]))
    def step(self, norms, size):
        self._step([True] * len(self.world.held), norms, size)

    @rule(
        has=st.lists(st.booleans(), min_size=8, max_size=8),
        scale=st.sampled_from([1.0, 4.0]),
        found=st.sampled_from([False, False, False, True]),
    )
    def step_of_some(self, has, scale, found):
        self._step([has[i % 8] for i in range(len(self.world.held))], False, scale, scale=scale, found_inf=found)

    def _step(self, has, norms, size, **more):
        if self.steps == 0:
            return
        self.steps -= 1
        world = self.world
        norms = norms and not ("stale norms" in PENDING and self.backend == "torch") and _pick([not self.short, True])
        for h, give in zip(world.held, has, strict=True):
            if h.place is None:
                continue
            dtype = h.p.dtype
            if world.optimizer.param_groups[h.place].get("grad_attribute") == "main_grad" and dtype != D:
                dtype = _pick([dtype, F, B])
            size = size if dtype != H else 1.0
            grad = gradient(h.p.shape, dtype, size)
            if _pick([False, True]) and grad.ndim > 1:
                grad = grad.mT.contiguous().mT
            world.give(h, grad if give and h.p.requires_grad else None)
        world.step(norms=norms, **more)
        self.cleared = False

    @precondition(lambda self: self.world.max_grad_norm is not None)
    @rule(i=_ANY)
    def step_with_an_inf(self, i):
        h = self._held(i)
        if h.place is not None and h.p.requires_grad and h.p.numel():
            world = self.world
            for other in world.held:
                if other.place is not None:
                    world.give(other, None)
            world.give(h, torch.full_like(h.p, float("inf")).detach())
            world.step()
            world.give(h, None)

    @rule(i=_ANY, what=st.sampled_from(["sparse", "state", "group"]))
    def refused(self, i, what):
        """Input that does not fit is refused, and nothing has been written."""
        h, world = self._held(i), self.world
        state = world.optimizer.state.get(h.p, {})
        if what == "group":
            bad = {"params": [("bad", h.p)] if self.named else [h.p], "rounding": "up"}
            world.assert_refused(".", ValueError, lambda: world.optimizer.add_param_group(bad))
            assert len(world.optimizer.param_groups) == len(self.kinds)
            return
        if h.place is None or not h.p.requires_grad or (what == "state" and "exp_avg" not in state):
            return
        for other in world.held:
            if other.place is not None:
                world.give(other, gradient(other.p.shape, other.p.dtype) if other.p.requires_grad else None)
        if what == "sparse":
            setattr(h.p, world.attribute(h), torch.ones_like(h.p).detach().to_sparse())
            world.assert_refused("sparse gradients: the gradient of")
            setattr(h.p, world.attribute(h), None)
        else:
            old, state["exp_avg"] = state["exp_avg"], torch.zeros(7)
            world.assert_refused(r"exp_avg of .* has shape \(7,\)")
            state["exp_avg"] = old

    # Parameters

    @_act(i=_ANY, data=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]))
    def write(self, i, data, share):
        h = self._held(i)
        data = data and not ("data write" in PENDING and self.world.storage(h).weight == "master")
        acts.write(self.world, h, data, share)

    @_act(i=_ANY, share=st.sampled_from([0.5, 1.0]))
    def mask(self, i, share):
        h = self._held(i)
        if not ("remainder zero" in PENDING and self.world.storage(h).weight == "remainder"):
            acts.mask(self.world, h, share)

    @_act(i=_ANY, what=st.sampled_from([acts.halve, acts.swap]))
    def write_digits(self, i, what):
        what(self.world, self._held(i))

    @_act(i=_ANY, layout=st.sampled_from(LAYOUTS), shift=st.sampled_from([0, 1, 3, 8]))
    def replace_data(self, i, layout, shift):
        h = self._held(i)
        if (layout == "gaps" and self.backend == "triton") or self._keeps_layout(h):
            layout = "rows"
        if "packed layout" in PENDING and self.backend == "torch":
            layout = None
        acts.replace_data(self.world, h, layout, shift)

    @staticmethod
    def _keeps_layout(h):
        """Another layout of a parameter with 8-bit moments is refused, because the scales have another shape there."""
        return h.p.shape == LARGE

    @_act(i=_ANY)
    def flatten(self, i):
        dtype = self._held(i).p.dtype
        some = [h for h in self.world.held if h.p.dtype == dtype]
        if "packed layout" in PENDING and self.backend == "torch":
            some = [h for h in some if h.p.is_contiguous()]
        if some:
            acts.flatten(self.world, some)

    @_act(i=_ANY)
    def transpose(self, i):
        h = self._held(i)
        if h.p.shape == (6, 6) and "same address" not in PENDING:
            acts.transpose(self.world, h)

    @_act(i=_ANY, frozen=st.booleans())
    def freeze(self, i, frozen):
        h = self._held(i)
        if h.place is not None:
            acts.freeze(self.world, h, frozen)

    # Groups

    @_act(i=_ANY, new_list=st.booleans())
    def take_out(self, i, new_list):
        h = self._held(i)
        if h.place is not None:
            acts.take_out(self.world, h, new_list)

    @_act(i=_ANY, j=_ANY, front=st.booleans())
    def put_in(self, i, j, front):
        h, place = self._held(i), self._place(j)
        if self._fits(h, place):
            if h.place is not None:
                acts.take_out(self.world, h)
            acts.put_in(self.world, h, place, front)

    def _fits(self, h, place):
        eight = h.p in self.world.optimizer.state and self.world.storage(h).exp_avg_sq == torch.uint8
        amsgrad = self.world.groups[place].amsgrad
        return h.p.dtype in dtypes_of(self.kinds[place], self.backend) and not (amsgrad and eight)

    @_act(j=_ANY)
    def reorder(self, j):
        acts.reorder(self.world, self._place(j))

    @_act(j=_ANY, key=st.sampled_from(sorted(_NUMBERS)), value=_ANY, tensor=st.booleans())
    def assign(self, j, key, value, tensor):
        values = _NUMBERS[key]
        acts.assign(self.world, self._place(j), key, values[value % len(values)], tensor and key == "lr")

    @_act(j=_ANY, value=_ANY)
    def edit_betas(self, j, value):
        if "list in place" not in PENDING:
            group = self.world.optimizer.param_groups[self._place(j)]
            group["betas"] = list(group["betas"])
            acts.edit_betas(self.world, self._place(j), _NUMBERS["betas"][value % 4])

    @precondition(lambda self: self.made < 5)
    @_act(combination=st.sampled_from(list(COMBINATIONS)))
    def add_group(self, combination):
        self._group(combination, 1)

    @_act(value=st.sampled_from([None, 0.5, 100.0]))
    def clip(self, value):
        acts.set_clip(self.world, value)

    # State and optimizer

    @_act(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        acts.copy_optimizer(self.world, how)

    @precondition(lambda self: not self.named or all(group["params"] for group in self.world.optimizer.param_groups))
    @_act(shuffle=st.booleans(), through_file=st.booleans())
    def load(self, shuffle, through_file):
        for h in self.world.held:
            if h.place is None:  # torch's state_dict() refuses state of parameters that are in no group
                acts.delete_state(self.world, h)
        acts.reload(self.world, shuffle and self.named, through_file)

    @_act(i=_ANY, by=st.sampled_from(["pop", "clear", "all"]))
    def delete_state(self, i, by):
        self.cleared = by == "clear"
        acts.delete_state(self.world, self._held(i), by)

    @_act(i=_ANY, j=_ANY, how=st.sampled_from(["zero", "copy", "replace"]))
    def edit_moment(self, i, j, how):
        h = self._held(i)
        if moments := acts.has_moments(self.world, h):
            acts.edit_moment(self.world, h, moments[j % len(moments)], how)

    @_act(j=_ANY, combination=st.sampled_from(list(COMBINATIONS)))
    def convert(self, j, combination):
        place = self._place(j)
        dtypes = dtypes_of(combination, self.backend)
        inside = [h for h in self.world.held if h.place == place]
        amsgrad = self.world.groups[place].amsgrad and "8-bit" in combination
        companion = self.backend == "torch" or any(self.world.optimizer.state.get(h.p) for h in inside)
        if "new companion" in PENDING and companion and COMBINATIONS[combination].storage.companion:
            return
        if all(h.p.dtype in dtypes for h in inside) and not amsgrad:
            acts.convert(self.world, place, combination)
            self.kinds[place] = combination

    @rule()
    def read_norms(self):
        if "norms without state" in PENDING and self.backend == "torch" and self.cleared:
            return
        before = self.world.bits()
        self.world.optimizer.norms()
        self.world.assert_unwritten(before, "norms()")

    def teardown(self):
        if self.world is not None and sys.exc_info()[0] is None:  # no rule has failed
            self.steps += 1
            self._step([True] * len(self.world.held), True, 1.0)


def _pick(values):
    """Return one of the values, from torch's generator, which `build` seeds."""
    return values[int(torch.randint(len(values), ()))]


def _run(backend, examples, steps, thorough=False):
    machine = type(f"Company_{backend}", (Company,), {"backend": backend, "thorough": thorough})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        ),
    )


def test_company_of_others_leaves_weights_within_float64_bounds(backend):
    _run(backend, examples=200, steps=6 if backend == "triton" else 10)


@pytest.mark.slow
def test_company_of_others_leaves_weights_within_float64_bounds_in_many_examples(backend):
    """5000 examples take about an hour on the interpreter."""
    _run(backend, examples=int(os.environ.get("COMPANY_EXAMPLES", "1000")), steps=20, thorough=True)
