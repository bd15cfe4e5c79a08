"""The example that converts a checkpoint of transformers keeps the moments of every parameter under its own name."""

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.engines

transformers = pytest.importorskip("transformers")


class Rates(transformers.TrainerCallback):
    """Notes with which lr each step of each run is taken."""

    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        run = self.seen.setdefault(Path(args.output_dir).name, {})
        run[state.global_step] = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:load_state_dict. the checkpoint was written without a width rule")
def test_converted_moments_are_those_of_the_same_name_and_every_step_takes_the_lr_of_the_schedule(monkeypatch):
    rates, made = Rates(), transformers.Trainer.__init__

    def make(self, *args, **options):
        made(self, *args, **options)
        self.add_callback(rates)

    monkeypatch.setattr(transformers.Trainer, "__init__", make)
    ran = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "old_checkpoint.py"))
    trainer = ran["trainer"]
    names = {p: name for name, p in trainer.model.named_parameters()}
    old, new = ([names[p] for g in of.optimizer.param_groups for p in g["params"]] for of in (ran["old"], trainer))
    assert old != new
    assert sorted(old) == sorted(new)
    was, now = ({name: ran[key][i] for i, name in enumerate(of)} for of, key in ((old, "was"), (new, "now")))
    for name in old:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert now[name][key].equal(was[name][key]), (name, key)
    assert list(rates.seen["new"]) == list(range(10, 20))
    for step, seen in rates.seen["new"].items():
        assert seen == pytest.approx([ran["LR"] * (1 - step / 20)] * 3), step
    assert sorted({g["width_lr_mult"] for g in trainer.optimizer.param_groups}) == [0.5, 1.0]
