"""What all commands have in common: a fast --help, pipes that nobody reads, wrong files, Ctrl-C, and no colours."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lwadamw import commands
from lwadamw.commands import COMMANDS, INTERRUPTED, UNREAD, main
from lwadamw.lab import demo
from lwadamw.lab.training import Settings

ROOT = Path(__file__).parents[2]
KOSSON = str(ROOT / "docs" / "data" / "kosson2025_fig1.csv")
RULE = ["rule", "--from", "64", "--to", "128", "--lr", "0.01", "--wd", "0.1"]


def test_help_of_every_command_needs_neither_torch_nor_numpy():
    """A module that is None cannot be imported. So no time goes into these two, which take most of it."""
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, triton=None)\n"
        "from lwadamw.commands import COMMANDS, main\n"
        "for name in ('', *COMMANDS):\n"
        "    try: main([name, '--help'] if name else ['--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m lwadamw") == len(COMMANDS) + 1


@pytest.mark.parametrize(
    "arguments",
    [RULE, ["transfer", KOSSON], ["transfer", "--help"], ["storage"], ["figures", "--data", "EMPTY", "--out", "EMPTY"]],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_pipe_that_nobody_reads_ends_a_command_silently(arguments, monkeypatch, capfd, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert main([str(tmp_path) if text == "EMPTY" else text for text in arguments]) == UNREAD
    monkeypatch.undo()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("when", ["while a command is imported", "while it runs"])
def test_ctrl_c_ends_with_one_word_at_any_moment(when, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if when == "while it runs":
        monkeypatch.setattr("lwadamw.lab.outcomes.read", interrupted)
    else:
        monkeypatch.setattr(commands.importlib, "import_module", interrupted)
    assert main(["transfer", KOSSON]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compare", "no/proxy.json", "no/target.json"], "no/proxy.json"),
        (["compare", "FOLDER", "FOLDER"], "FOLDER"),
        (["transfer", "no/runs.csv"], "no/runs.csv"),
        (["transfer", "FOLDER"], "FOLDER"),
        (["transfer", KOSSON, "--json", "no/out.json"], "no/out.json"),
        (["transfer", KOSSON, "--json", "FOLDER"], "FOLDER"),
        (["transfer", KOSSON, "--plot", "no/out.svg"], "no/out.svg"),
        (["sweep", "--out", "no/runs.csv"], "no/runs.csv"),
        (["sweep", "--out", "FOLDER", "--data", KOSSON], "FOLDER"),
        (["sweep", "--data", "no/text.txt"], "no/text.txt"),
        (["synthetic", "--out", "FOLDER"], "FOLDER"),
        (["demo", "--out", "FOLDER", "--data", KOSSON], "FOLDER"),
        (["figures", "--data", "no/data"], "no/data"),
        (["figures", "--report", "no/report.md"], "no/report.md"),
    ],
    ids=lambda value: " ".join(value).replace(str(ROOT), "") if isinstance(value, list) else "",
)
def test_a_wrong_file_gives_exit_code_2_and_a_message_that_names_it(arguments, named, tmp_path, capsys, monkeypatch):
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("place", ["a terminal with NO_COLOR", "a file"])
def test_progress_has_no_colours_where_none_are_wanted(place, monkeypatch):
    pytest.importorskip("rich")
    out = io.StringIO() if place == "a file" else _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    settings = Settings(base_width=32, depth=1, steps=10)
    names = [f"layers.0.{name}.weight" for name in ("attention.qkv", "ffn.down", "ffn.up")]
    record = SimpleNamespace(step=10, loss=1.0, grad_norm=1.0, seconds=1.0, ratio=[1.0, 1.0, 1.0])
    with demo._progress(SimpleNamespace(settings=settings, matrices=names)) as show:
        show(record)
    assert "10/10" in out.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]", out.getvalue()), "a colour"
    assert place != "a file" or "\x1b" not in out.getvalue()
