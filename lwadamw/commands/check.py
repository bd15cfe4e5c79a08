"""`python -m lwadamw check`: do activations and updates keep their size over the width, in a few steps and over tau?"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..monitor.text import aligned
from .arguments import RULE_NAMES, output_file, positive, refuse, rule_name, whole
from .factory import EXAMPLE, find, literal

if TYPE_CHECKING:
    from torch import nn

    from .coordinates import Layer


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="coordinate check: activations and updates over the width, and what weight decay adds over tau",
        description="Build a model at several widths, train each for a few steps on one batch, and print for every kind of "
        "layer: the size of its output, the size of the change of its output, and the slope of both against the width, in "
        "octaves per octave. A few steps do not show the decay. So a second table says how tau, the gain and the relative "
        "update depend on the width once some tau have passed, from the effective learning rates and weight decays. The exit "
        "code is 1 if an output grows with the width, or a change of an output grows or shrinks. Otherwise it is 0.",
    )
    option = parser.add_argument
    option(
        "factory", metavar="module:factory", help=f"function that takes width=N and returns the model, like {EXAMPLE}"
    )
    option("--widths", nargs="+", type=whole, required=True, metavar="N", help="two widths or more")
    option(
        "--rule",
        type=rule_name,
        default="fan2025",
        metavar="RULE",
        help=f"{RULE_NAMES} (default: %(default)s). The depth is the same at every width",
    )
    option("--base-width", type=whole, metavar="N", help="width of the proxy (default: the smallest width)")
    option("--args", nargs="+", default=[], metavar="k=v", help="further arguments of the factory, like depth=4")
    option("--loss", metavar="module:function", help="function of the model that returns the loss of a fixed batch")
    option("--lr", type=positive, default=1e-2, metavar="X", help="base learning rate (default: %(default)s)")
    option("--weight-decay", type=positive, default=0.1, metavar="X", help="base weight decay (default: %(default)s)")
    option("--steps", type=whole, default=5, metavar="N", help="steps of every run (default: %(default)s)")
    option("--seeds", type=whole, default=2, metavar="N", help="use the seeds 0 to N-1 (default: %(default)s)")
    option("--json", type=Path, metavar="OUT", help="write the numbers into a file")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    widths = sorted(set(args.widths))
    if len(widths) < 2:
        parser.error(f"argument --widths: {widths[0]} is only one width. Give two or more, like --widths 64 128 256.")
    output_file(parser, "--json", args.json)
    from . import coordinates

    try:
        arguments = dict(map(literal, args.args))
        factory = find("module:factory", args.factory)
        given = None if args.loss is None else find("--loss", args.loss)
        layers = coordinates.check(
            lambda width: _model(args.factory, factory(width=width, **arguments)),
            widths,
            args.rule,
            args.base_width or widths[0],
            batch=None if given is None else (),
            loss=None if given is None else lambda model, _: given(model),  # type: ignore[arg-type, return-value]
            lr=args.lr,
            weight_decay=args.weight_decay,
            steps=args.steps,
            seeds=args.seeds,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        refuse(parser, error, f"{args.factory}: ")
    lines, bad = _measured(widths, layers)
    first = (
        "not flat: " + "; ".join(bad)
        if bad
        else "flat: no output grows, and no change of an output depends on the width"
    )
    first = "\n".join([first, *_at_initialisation(widths, layers)])
    title = f"rule {args.rule}, base width {args.base_width or widths[0]}, {args.steps} steps, {args.seeds} seeds"
    print("\n".join([first, title, "", *lines, "", *_over_tau(widths, layers, args.steps)]))
    if args.json is not None:
        found = {"widths": widths, "layers": [coordinates.as_dict(widths, layer) for layer in layers]}
        args.json.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    return 1 if bad else 0


def _model(path: str, model: object) -> nn.Module:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ValueError(f"returned {type(model).__name__}, not a torch.nn.Module. Return the model from {path}.")
    return model


def _measured(widths: Sequence[int], layers: Sequence[Layer]) -> tuple[list[str], list[str]]:
    """Return the table of what was measured, and a text for everything that is not as it should be."""
    from .coordinates import slope, verdict

    rows, bad = [], []
    for layer in layers:
        for what, values in (("output", layer.activation), ("change", layer.update)):
            found = slope(widths, values)
            said = verdict(found)
            if said == "grows" or (said == "shrinks" and what == "change"):
                bad.append(f"the {what} of {layer.name} {said} as width^{found:+.2f}")
            spread = max(values) / min(values) if min(values) > 0 else math.nan
            numbers = (*(f"{value:.3g}" for value in values), f"{spread:.2f}", f"{found:+.2f}")
            rows.append((layer.role, layer.name, what, *numbers, said))
    header = ("role", "layers", "", *(f"width {width}" for width in widths), "max/min", "slope", "")
    return aligned([header, *rows], range(3, len(header) - 1)), bad


def _at_initialisation(widths: Sequence[int], layers: Sequence[Layer]) -> list[str]:
    """Return a text if outputs of matrices grow with the width before the first step, which no learning rate mends."""
    from .coordinates import INITIAL, slope

    slopes = {layer.name: slope(widths, layer.initial) for layer in layers if layer.role == "matrix"}
    grows = [f"{name} as width^{found:+.2f}" for name, found in slopes.items() if found > INITIAL]
    if not grows:
        return []
    return [
        f"before the first step, outputs grow already: {'; '.join(grows)}. No learning rate mends that. Initialise matrices "
        "with a standard deviation that is proportional to fan_in^-0.5. In transformers this is initializer_range=0.02 * "
        f"({widths[0]} / width) ** 0.5."
    ]


def _over_tau(widths: Sequence[int], layers: Sequence[Layer], steps: int) -> list[str]:
    """Return the table of what weight decay does over tau."""
    from .coordinates import slope

    rows = []
    for layer in layers:
        if math.isfinite(layer.tau[0]):
            seen = 100 * steps / layer.tau[0]
            slopes = (f"{slope(widths, layer.gain):+.2f}", f"{slope(widths, layer.relative):+.2f}")
            rows.append((layer.name, *(f"{tau:.4g}" for tau in layer.tau), f"{seen:.2g} %", *slopes))
    if not rows:
        return ["no matrix has weight decay, so nothing changes over tau"]
    header = ("after some tau", *(f"tau at {width}" for width in widths), "decayed so far", "gain", "relative update")
    note = (
        "tau is in steps. The last two columns are slopes against the width, from sqrt(lr/wd) fan_in^0.75 and sqrt(lr wd). The "
        "steps above saw only the share 'decayed so far' of it."
    )
    return [*aligned([header, *rows], range(1, len(header))), note]
