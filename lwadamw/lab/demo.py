"""The demo: train one model at two widths with the same base values, and compare the steady states of the weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

import lwadamw

from .data import Corpus, unigram_entropy
from .report import closing, draw
from .training import Record, Run, Settings

PRESETS: Final[Mapping[str, Settings]] = {
    "cpu": Settings(),
    "cuda": Settings(base_width=128, batch=32, steps=1500),
    "quick": Settings(base_width=32, depth=2, context=32, batch=4, steps=10),
}


def run(settings: Settings, widths: Sequence[int], corpus: Corpus, device: torch.device, out: Path) -> int:
    """Train a model at every width, then print the results and draw a figure.

    Args:
        settings: what all widths have in common.
        widths: widths to train, the proxy first.
        corpus: text to train on.
        device: where to train.
        out: path of the figure, a PNG file.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended the training early. The results so far are shown in both cases.
    """
    print(f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} for validation.")
    print(
        f"Knowing only how often each byte occurs leaves {unigram_entropy(corpus.train) / math.log(2):.2f} bits/byte."
    )
    runs: list[Run] = []
    code = 0
    try:
        for width in widths:
            current = Run(settings, width, corpus, device)
            runs.append(current)
            print(f"\nwidth {width}, m = {current.m:g}, on {device}")
            print(lwadamw.summary(current.optimizer, steps=settings.steps))
            with _progress(current) as show:
                for record in current.train():
                    show(record)
            current.evaluate()
    except KeyboardInterrupt:
        code = 130
        print("\ninterrupted: these are the results so far")
    seen = [r for r in runs if r.records]
    for r in seen:
        if not r.top.size:
            r.evaluate()
    print(f"\n{closing(seen)}")
    if seen:
        print(draw(seen, out))
    return code


@contextmanager
def _progress(run: Run) -> Iterator[Callable[[Record], None]]:
    """Give a function that shows a record: in place on a terminal if rich is installed, otherwise as a line now and then."""
    first, last = "layers.0.", f"layers.{run.settings.depth - 1}."
    shown = {
        f"{name.split('.')[3]}.{name.split('.')[1]}": list(run.matrices).index(name)
        for name in (first + "attention.qkv.weight", first + "ffn.down.weight", last + "ffn.up.weight")
    }
    steps, tokens = run.settings.steps, run.settings.batch * run.settings.context

    def line(r: Record) -> str:
        step, left = f"{r.step:>{len(str(steps))}}/{steps}", (steps - r.step) * r.seconds / r.step
        speed = f"{tokens * r.step / r.seconds / 1000:.1f}k tokens/s  {left:3.0f} s left"
        ratios = "  ".join(f"{name} {r.ratio[i]:.2f}" for name, i in shown.items())
        return f"{step}  loss {r.loss:.3f}  grad norm {r.grad_norm:.2f}  {speed}  RMS/predicted {ratios}"

    if sys.stdout.isatty():
        try:
            from rich.console import Group
            from rich.live import Live
            from rich.progress_bar import ProgressBar
            from rich.text import Text
        except ImportError:
            pass
        else:
            with Live(auto_refresh=False) as live:

                def update(r: Record) -> None:
                    live.update(Group(Text(line(r)), ProgressBar(steps, r.step, width=60)), refresh=True)

                yield update
            return

    def write(r: Record) -> None:
        if r.step % (5 * run.settings.every) == 0 or r.step in (run.settings.every, steps):
            print(line(r), flush=True)

    yield write
