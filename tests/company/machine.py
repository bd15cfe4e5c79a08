"""Company: a state machine of everything that others do, in random order."""

import sys

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lwadamw.state.combinations import COMBINATIONS
from tests.company import acts
from tests.company.choices import NUMBERS, act_rule, pick
from tests.company.storages import LARGE, LAYOUTS, SMALL, B, D, F, H, dtypes_of, gradient, options_of, weights
from tests.company.world import World

_ANY = st.integers(0, 5)  # a parameter or a group, modulo how many there are


class Company(RuleBasedStateMachine):
    """An optimizer among others."""

    backend = "torch"
    thorough = False
    steps = 10**9  # how many steps may stand between the first one and the last one

    def __init__(self):
        super().__init__()
        self.world, self.kinds, self.made = None, [], 0

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
        if self.backend == "triton":
            self.steps = 3
        if self.short:  # the interpreter takes about 35 ms for each parameter
            self.steps = pick([0, 0, 0, 1])
            groups = groups[: pick([1, 1, 2])]
        self.named = named
        self.world = World(self.backend, max_grad_norm=clip)
        self.world.guard_state = guard_state
        for i, combination in enumerate(groups):
            self._group(combination, 1 if self.short else 1 + (seed >> i) % (2 if self.backend == "triton" else 3))
        if pick([False, True, True, True]):
            self.steps += 1
            self._step([True] * len(self.world.held), True, 1.0)

    def _group(self, combination, n):
        """Add a group of n random parameters."""
        world, options = self.world, {k: pick(values) for k, values in NUMBERS.items()}
        options["amsgrad"] = pick([False, False, True]) and "8-bit" not in combination
        if pick([False, True]):
            options |= {"width_lr_mult": 0.25, "width_wd_mult": 2.0, "width_eps_mult": 0.5}
        if pick([False, False, True]):
            options["grad_attribute"] = "main_grad"
        params = []
        for _ in range(n):
            dtype = pick(dtypes_of(combination, self.backend))
            large = "8-bit" in combination and pick([self.backend == "torch", self.thorough, False, False])
            shape = LARGE if large else pick(SMALL)
            layout = "rows" if large else pick(LAYOUTS if self.backend == "torch" else LAYOUTS[:-1])
            params.append((f"w{self.made}", world.parameter(weights(shape, dtype), layout, pick([0, 1, 3, 8]))))
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
        norms = norms and pick([not self.short, True])
        for h, give in zip(world.held, has, strict=True):
            if h.place is None:
                continue
            dtype = h.p.dtype
            if world.optimizer.param_groups[h.place].get("grad_attribute") == "main_grad" and dtype != D:
                dtype = pick([dtype, F, B])
            size = size if dtype != H else 1.0
            grad = gradient(h.p.shape, dtype, size)
            if pick([False, True]) and grad.ndim > 1:
                grad = grad.mT.contiguous().mT
            world.give(h, grad if give and h.p.requires_grad else None)
        world.step(norms=norms, **more)

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

    @act_rule(i=_ANY, data=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]))
    def write(self, i, data, share):
        acts.write(self.world, self._held(i), data, share)

    @act_rule(i=_ANY, share=st.sampled_from([0.5, 1.0]))
    def mask(self, i, share):
        acts.mask(self.world, self._held(i), share)

    @act_rule(i=_ANY, what=st.sampled_from([acts.halve, acts.swap]))
    def write_digits(self, i, what):
        what(self.world, self._held(i))

    @act_rule(i=_ANY, layout=st.sampled_from(LAYOUTS), shift=st.sampled_from([0, 1, 3, 8]))
    def replace_data(self, i, layout, shift):
        h = self._held(i)
        if (layout == "gaps" and self.backend == "triton") or self._keeps_layout(h):
            layout = "rows"
        acts.replace_data(self.world, h, layout, shift)

    @staticmethod
    def _keeps_layout(h):
        """Another layout of a parameter with 8-bit moments is refused, because the scales have another shape there."""
        return h.p.shape == LARGE

    @act_rule(i=_ANY)
    def flatten(self, i):
        dtype = self._held(i).p.dtype
        some = [h for h in self.world.held if h.p.dtype == dtype]
        acts.flatten(self.world, some)

    @act_rule(i=_ANY)
    def transpose(self, i):
        h = self._held(i)
        if h.p.shape == (6, 6):
            acts.transpose(self.world, h)

    @act_rule(i=_ANY, frozen=st.booleans())
    def freeze(self, i, frozen):
        h = self._held(i)
        if h.place is not None:
            acts.freeze(self.world, h, frozen)

    # Groups

    @act_rule(i=_ANY, new_list=st.booleans())
    def take_out(self, i, new_list):
        h = self._held(i)
        if h.place is not None:
            acts.take_out(self.world, h, new_list)

    @act_rule(i=_ANY, j=_ANY, front=st.booleans())
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

    @act_rule(j=_ANY)
    def reorder(self, j):
        acts.reorder(self.world, self._place(j))

    @act_rule(j=_ANY, key=st.sampled_from(sorted(NUMBERS)), value=_ANY, tensor=st.booleans())
    def assign(self, j, key, value, tensor):
        values = NUMBERS[key]
        acts.assign(self.world, self._place(j), key, values[value % len(values)], tensor and key == "lr")

    @act_rule(j=_ANY, value=_ANY)
    def edit_betas(self, j, value):
        group = self.world.optimizer.param_groups[self._place(j)]
        group["betas"] = list(group["betas"])
        acts.edit_betas(self.world, self._place(j), NUMBERS["betas"][value % 4])

    @precondition(lambda self: self.made < 5)
    @act_rule(combination=st.sampled_from(list(COMBINATIONS)))
    def add_group(self, combination):
        self._group(combination, 1)

    @act_rule(value=st.sampled_from([None, 0.5, 100.0]))
    def clip(self, value):
        acts.set_clip(self.world, value)

    # State and optimizer

    @act_rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        acts.copy_optimizer(self.world, how)

    @precondition(lambda self: not self.named or all(group["params"] for group in self.world.optimizer.param_groups))
    @act_rule(shuffle=st.booleans(), through_file=st.booleans())
    def load(self, shuffle, through_file):
        for h in self.world.held:
            if h.place is None:  # torch's state_dict() refuses state of parameters that are in no group
                acts.delete_state(self.world, h)
        acts.reload(self.world, shuffle and self.named, through_file)

    @act_rule(i=_ANY, by=st.sampled_from(["pop", "clear", "all"]))
    def delete_state(self, i, by):
        acts.delete_state(self.world, self._held(i), by)

    @act_rule(i=_ANY, j=_ANY, how=st.sampled_from(["zero", "copy", "replace"]))
    def edit_moment(self, i, j, how):
        h = self._held(i)
        if moments := acts.has_moments(self.world, h):
            acts.edit_moment(self.world, h, moments[j % len(moments)], how)

    @act_rule(j=_ANY, combination=st.sampled_from(list(COMBINATIONS)))
    def convert(self, j, combination):
        place = self._place(j)
        dtypes = dtypes_of(combination, self.backend)
        inside = [h for h in self.world.held if h.place == place]
        amsgrad = self.world.groups[place].amsgrad and "8-bit" in combination
        if all(h.p.dtype in dtypes for h in inside) and not amsgrad:
            acts.convert(self.world, place, combination)
            self.kinds[place] = combination

    @rule()
    def read_norms(self):
        before = self.world.bits()
        self.world.optimizer.norms()
        self.world.assert_unwritten(before, "norms()")

    def teardown(self):
        if self.world is not None and sys.exc_info()[0] is None:  # no rule has failed
            self.steps += 1
            self._step([True] * len(self.world.held), True, 1.0)
