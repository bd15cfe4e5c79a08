"""What lwadamw.Monitor costs at its default cadence, as a share of training time.

    python -m bench.monitor                     # the laboratory's LLaMA; on a CPU widths 64 and 256, on a GPU 256 and 1024
    python -m bench.monitor --width 512 --json monitor.json

Copies of one model train by turns of a few steps, timed from batch to cleared gradients: on a GPU by the clock, the device
synchronised at both ends; on a CPU in processor time of one thread, which other processes disturb less. One has no monitor, one
a monitor that never reads, one that reads every step, and one that also measures singular values every step, from random
vectors, as if the weights had turned altogether since the last time. Of each, what a step costs more than one of the copy
before it: the median over turns of the difference within a turn.

    share   (between readings + reading/every + spectrum/spectrum_every) / step without a monitor
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench import harness
from bench.train import SETTINGS, WINDOWS, Trainer, plain

STEPS = 4  # a turn
GPU = {"widths": (256, 1024), "depth": 8, "context": 512, "batch": 32, "rounds": 30}
CPU = {"widths": (64, 256), "depth": 4, "context": 128, "batch": 8, "rounds": 30}
DRY = {"widths": (32,), "depth": 1, "context": 16, "batch": 2, "rounds": 2}
WITHOUT, BETWEEN, READING, SPECTRUM = "without", "between readings", "reading", "spectrum"
NEVER = 10**9


def trainers(model: torch.nn.Module, width: int) -> dict[str, Trainer]:
    import lwadamw

    def make(every: int | None, spectrum_every: int = 0) -> Trainer:
        trainer = Trainer(model, lwadamw.AdamW, plain)
        # At the proxy's own width: every multiplier is 1, and roles are known.
        groups = lwadamw.param_groups(trainer.model, base_width=width)
        trainer.optimizer = lwadamw.AdamW(groups, **SETTINGS)
        if every is None:
            return trainer
        monitor = lwadamw.Monitor(trainer.optimizer, every=every, spectrum_every=spectrum_every, history=1)
        if spectrum_every:
            monitor.on_reading.append(lambda _: monitor.forget_spectrum())
        return trainer

    return {WITHOUT: make(None), BETWEEN: make(NEVER), READING: make(1), SPECTRUM: make(1, 1)}


def measure(device: torch.device, config: dict[str, Any], width: int) -> dict[str, Any]:
    import lwadamw
    from lwadamw.lab.data import batches, standard_library
    from lwadamw.lab.model import ModelConfig, Transformer

    model = Transformer(ModelConfig(width, config["depth"], context=config["context"]), seed=0).to(device)
    source = batches(standard_library().train, config["batch"], config["context"], seed=0)
    drawn = [next(source).to(device) for _ in range(WINDOWS)]
    entered = trainers(model, width)
    times: dict[str, list[float]] = {name: [] for name in entered}
    for round_ in range(config["rounds"] + 1):
        turn = [drawn[(round_ * STEPS + i) % WINDOWS] for i in range(STEPS)]
        for name in harness.shuffled(entered, round_):
            start = time.process_time()
            seconds, _ = entered[name].turn(turn)
            if device.type == "cpu":
                seconds = time.process_time() - start
            if round_:
                times[name].append(seconds / STEPS)

    def more(name: str, than: str) -> float:
        return statistics.median(a - b for a, b in zip(times[name], times[than], strict=True))

    step = statistics.median(times[WITHOUT])
    between, reading, spectrum = more(BETWEEN, WITHOUT), more(READING, BETWEEN), more(SPECTRUM, READING)
    defaults = lwadamw.Monitor(entered[WITHOUT].optimizer)
    every, spectrum_every = defaults.every, defaults.spectrum_every
    defaults.remove()
    return {
        "width": width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "every": every,
        "spectrum_every": spectrum_every,
        "step_ms": harness.quantiles([t * 1e3 for t in times[WITHOUT]]),
        "between_ms": between * 1e3,
        "reading_ms": reading * 1e3,
        "spectrum_ms": spectrum * 1e3,
        "share": (between + reading / every + spectrum / spectrum_every) / step,
    }


def table(results: list[dict[str, Any]], config: dict[str, Any]) -> str:
    first = results[0]
    cadence = f"every {first['every']} and {first['spectrum_every']} steps"
    title = f"{config['batch']} x {config['context']} tokens a step, {cadence}"
    header = [title, "parameters", "ms/step", "between", "reading", "spectrum", "share"]
    rows = [
        [
            f"width {r['width']}, {r['tensors']} tensors",
            f"{r['parameters'] / 1e6:.2f}M",
            f"{r['step_ms']['p50']:.2f}",
            f"{r['between_ms']:.3f}",
            f"{r['reading_ms']:.2f}",
            f"{r['spectrum_ms']:.2f}",
            f"{r['share']:.2%}",
        ]
        for r in results
    ]
    return harness.table(header, rows)


def parse() -> argparse.Namespace:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--width", type=int, action="append", help="instead of the default widths; may be given again")
    for name in ("depth", "context", "batch", "rounds"):
        parser.add_argument(f"--{name}", type=int, help=f"default: {GPU[name]} on a GPU, {CPU[name]} on a CPU")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = harness.choose_device(arguments.device)
    config = dict(DRY if arguments.dry_run else GPU if device.type == "cuda" else CPU)
    names = ("depth", "context", "batch", "rounds")
    config |= {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if device.type == "cpu":
        torch.set_num_threads(1)
    results = [measure(device, config, width) for width in arguments.width or config["widths"]]
    print(table(results, config))
    figures = {"config": config, "steps": STEPS, "results": results}
    harness.finish(arguments.json, "bench.monitor", device, figures, 1 if device.type == "cpu" else None)


if __name__ == "__main__":
    main()
