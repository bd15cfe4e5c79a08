"""`python -m lwadamw figures`: make the figures and tables of the documentation from its CSV files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from .arguments import refuse

DATA: Final = Path("docs/data")
REPORT: Final = Path("docs/width_transfer.md")
SCALING: Final = Path("docs/scaling.md")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "figures",
        help="make the figures and tables of the documentation from its CSV files",
        description="Draw every figure whose CSV file exists, and fill in the tables of the report. The same files give the "
        "same bytes.",
    )
    option = parser.add_argument
    option("--data", type=Path, default=DATA, metavar="DIR", help="folder of CSV files (default: %(default)s)")
    option(
        "--out", type=Path, default=Path("docs/figures"), metavar="DIR", help="folder of figures (default: %(default)s)"
    )
    option(
        "--report",
        type=Path,
        metavar="MD",
        help="report whose tables are filled in (default: docs/width_transfer.md and docs/scaling.md, if they exist)",
    )
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..lab import figures, findings, scaling_findings

    if args.report is not None and not args.report.is_file():
        parser.error(
            f"argument --report: there is no file {str(args.report)!r}. Give the report whose tables are filled in."
        )
    if not args.data.is_dir():
        parser.error(f"argument --data: {str(args.data)!r} is no folder. Give the folder with the CSV files.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for line in figures.remake(args.data, args.out, (*figures.FIGURES, *scaling_findings.FIGURES)):
            print(line, flush=True)
        there = [report for report in (REPORT, SCALING) if args.data == DATA and report.is_file()]
        for report in [args.report] if args.report else there:
            text = findings.refresh(report.read_text(), args.data)
            report.write_text(findings.refresh(text, args.data, scaling_findings.TABLES))
            print(f"{report}: tables from {args.data}")
    except (ValueError, RuntimeError, OSError) as error:
        refuse(parser, error)
    return 0
