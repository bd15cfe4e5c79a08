"""Tokens per second of a small LLaMA, trained with each optimizer in turn.

    python -m bench.train                           # on a GPU 220M parameters under bf16 autocast, on a CPU 0.9M
    python -m bench.train --width 512 --depth 8 --json train.json

The model is the LLaMA of lwadamw.lab. Every optimizer trains its own copy of the model, from the same weights, on the same
windows of text, with the same settings. There are two groups: matrices with weight decay, and vectors without. The optimizers
take turns of a few steps. The clock times a turn from the batch to the updated weights, including `zero_grad`. The device is
synchronised at the start and at the end of a turn. A first turn of each optimizer is not counted.

    usual way   clip_grad_norm_, torch fused, and the norm of every weight and gradient, moved to the host once per step
    loss        mean over the last turn, in nats per byte. Up to rounding it is equal for all optimizers that clip, and equal
                for all optimizers that do not clip.
    vs fused    tokens per second / tokens per second of torch fused: the median over turns
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import harness, peers

STEPS = 5  # steps in one turn
GPU = {"width": 1024, "depth": 16, "head_dim": 64, "context": 512, "batch": 16, "rounds": 12}
CPU = {"width": 128, "depth": 4, "head_dim": 32, "context": 64, "batch": 4, "rounds": 15}
DRY = {"width": 32, "depth": 1, "head_dim": 16, "context": 16, "batch": 2, "rounds": 2}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
CLIP = 1.0
WINDOWS = 64  # number of batches; they are drawn before the measurement and used repeatedly


def make_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, and vectors without."""
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


class Trainer:
    """A copy of a model with an optimizer.

    Args:
        model: the model; it is copied.
        make: makes the optimizer from groups and SETTINGS.
        step: updates the parameters once they have gradients. It gets the parameters and the optimizer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        step: Callable[[Sequence[Tensor], Any], object],
    ) -> None:
        self.model = copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.optimizer = make(make_groups(self.model), **SETTINGS)
        self.step = step
        self.device = self.params[0].device

    def turn(self, batches: Sequence[Tensor]) -> tuple[float, float]:
        """Train one step on each batch, and return the seconds and the mean loss."""
        losses = []
        self._wait()
        start = time.perf_counter()
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model.loss(batch)
            loss.backward()
            self.step(self.params, self.optimizer)
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self._wait()
        return time.perf_counter() - start, float(torch.stack(losses).mean())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def plain(params: Sequence[Tensor], optimizer: Any) -> None:
    """Take a step."""
    optimizer.step()


def norms_read(params: Sequence[Tensor], optimizer: Any) -> None:
    """Take a step and read the norms."""
    optimizer.step()
    optimizer.norms()


def trainers(model: torch.nn.Module) -> dict[str, Trainer]:
    """A trainer for each optimizer, by name."""
    import lwadamw

    def make(kind: Any, **options: Any) -> Callable[..., torch.optim.Optimizer]:
        return lambda groups, **settings: kind(groups, **settings, **options)

    fused = make(torch.optim.AdamW, fused=True)
    ours, clipping = make(lwadamw.AdamW), make(lwadamw.AdamW, max_grad_norm=CLIP)
    return {
        "lwadamw": Trainer(model, ours, plain),
        "lwadamw, norms read every step": Trainer(model, ours, norms_read),
        "lwadamw, clipping, norms read every step": Trainer(model, clipping, norms_read),
        peers.FUSED: Trainer(model, fused, plain),
        "torch foreach": Trainer(model, make(torch.optim.AdamW, foreach=True), plain),
        "usual way: clip_grad_norm_, fused, norms": Trainer(
            model, fused, lambda params, optimizer: peers.usual_way(params, optimizer, CLIP)
        ),
    }


def measure(device: torch.device, config: dict[str, int]) -> dict[str, Any]:
    """Train with every optimizer.

    Args:
        device: the device to train on.
        config: sizes with the keys of GPU, CPU and DRY.

    Returns:
        The result as it is written to JSON, with `rows` by optimizer.
    """
    from lwadamw.lab.data import batches, standard_library
    from lwadamw.lab.model import ModelConfig, Transformer

    shape = ModelConfig(**{key: config[key] for key in ("width", "depth", "head_dim", "context")})
    model = Transformer(shape, seed=0).to(device)
    source = batches(standard_library().train, config["batch"], config["context"], seed=0)
    drawn = [next(source).to(device) for _ in range(WINDOWS)]
    entered = trainers(model)
    times: dict[str, list[float]] = {name: [] for name in entered}
    losses: dict[str, float] = {}
    for round_ in range(config["rounds"] + 1):
        turn = [drawn[(round_ * STEPS + i) % WINDOWS] for i in range(STEPS)]
        for name in harness.shuffled(entered, round_):
            seconds, losses[name] = entered[name].turn(turn)
            if round_:
                times[name].append(seconds)
    tokens = STEPS * config["batch"] * config["context"]
    rows = {
        name: {
            "tokens_per_second": harness.quantiles([tokens / t for t in times[name]]),
            "ms_per_step": harness.quantiles([t / STEPS * 1e3 for t in times[name]])["p50"],
            "vs_fused": harness.ratio(times, name, peers.FUSED),
            "loss": losses[name],
        }
        for name in entered
    }
    parameters = sum(p.numel() for p in model.parameters())
    tensors = sum(1 for _ in model.parameters())
    return {"config": config, "parameters": parameters, "tensors": tensors, "steps": STEPS, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A table with a row for each optimizer."""
    c = result["config"]
    title = f"{result['parameters'] / 1e6:.1f}M parameters in {result['tensors']} tensors, {c['batch']} x {c['context']} tokens"
    rows = []
    for name, row in result["rows"].items():
        rates = [f"{row['tokens_per_second'][p]:,.0f}" for p in ("p20", "p50", "p80")]
        rows.append([name, *rates, f"{row['ms_per_step']:.2f}", f"{row['vs_fused']:.3f}x", f"{row['loss']:.4f}"])
    return harness.table([title, "tokens/s p20", "p50", "p80", "ms/step", "vs fused", "loss"], rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser_for(__doc__)
    for name in CPU:
        sizes = f"default: {GPU[name]} on a GPU, {CPU[name]} on a CPU"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=sizes)
    return parser.parse_args()


def config_for(device: torch.device, dry: bool) -> dict[str, int]:
    """A copy of the default sizes for a device, or of the tiny sizes of a dry run."""
    return dict(DRY if dry else GPU if device.type == "cuda" else CPU)


def main() -> None:
    """Train, print the table and write the JSON file."""
    arguments = parse()
    device = harness.choose_device(arguments.device)
    config = config_for(device, arguments.dry_run)
    config |= {name: value for name in CPU if (value := getattr(arguments, name)) is not None}
    result = measure(device, config)
    print(table(result))
    harness.finish(arguments.json, "bench.train", device, result)


if __name__ == "__main__":
    main()
