"""`python -m lwadamw compare`: its table, its exit codes, and what it says about bad files and arguments."""

import dataclasses

import pytest
import torch

import lwadamw
from lwadamw import RULES, AdamW, DriftWatch, param_groups
from lwadamw.commands import main
from lwadamw.monitor.comparison import COMPARE_TOLERANCE, compare
from lwadamw.monitor.profile_file import load
from tests.monitor.profiles import made, written


def test_the_exit_code_is_1_if_something_drifted_and_the_table_names_it(tmp_path, capsys):
    rule = RULES["fan2025"]
    proxy = written(tmp_path / "proxy.json", made(rule, 1.0))
    good = written(tmp_path / "good.json", made(rule, 4.0))
    bad = written(tmp_path / "bad.json", made(rule, 4.0, factors={("attention.qkv", "gain"): 2.5}))
    early = written(tmp_path / "early.json", made(rule, 4.0, taus=1.0))

    assert main(["compare", proxy, good]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "held: fan2025 claims that top and gain stay equal; top and gain did in 2 kinds of matrices (median x"
    )
    assert lines[1].startswith(
        "proxy   rule fan2025   base lr 0.003, weight_decay 0.5   steps 910 to 1000 of 1000   batch 8"
    )
    assert lines[3].split() == ["role", "layers", "statistic", "proxy", "target", "ratio", "predicted", "off", "by"]
    assert "tolerance 1.35 for the median, 2.23 for one kind: 12 as predicted, 1 no prediction" in lines[-1]
    assert not any("norm.weight" in line for line in lines)

    assert main(["compare", proxy, bad]) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("matrix") and "grew" in x)
    assert line.split()[:3] == ["matrix", "layers.*.attention.qkv.weight", "gain"]
    assert main(["compare", proxy, bad, "--tolerance", "2"]) == 0
    assert main(["compare", proxy, bad, "--statistic", "top", "--statistic", "alignment_ratio"]) == 0
    assert main(["compare", proxy, bad, "--full"]) == 1
    assert "layers.1.attention.qkv.weight" in capsys.readouterr().out
    assert main(["compare", proxy, early]) == 0
    assert "nothing could be judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "No such file"),
        ("alone", [], "has nothing to be compared with"),
        ("{", [], "is no JSON"),
        ("[]", [], "is no profile of lwadamw. Give a file that Monitor.save() wrote"),
        ('{"format": "other"}', [], "is no profile of lwadamw"),
        ('{"format": "lwadamw profile", "version": 0, "lwadamw": "0.0.1"}', [], "has version 0 of the format"),
        ('{"format": "lwadamw profile", "version": 1, "lwadamw": "0.1.0"}', [], "is a damaged profile: KeyError"),
        ("good", ["--tolerance", "1"], "tolerance=1.0 is not above 1"),
        ("good", ["--tolerance", "nan"], "tolerance=nan is not above 1"),
        ("good", ["--tolerance", "x"], "invalid float value"),
        ("good", ["--statistic", "loss"], "no run has the statistic 'loss'"),
        ("other", [], "no layer in common"),
    ],
)
def test_bad_files_and_arguments_exit_with_2_and_say_why(tmp_path, capsys, content, arguments, message):
    proxy = written(tmp_path / "proxy.json", made(RULES["mup"], 1.0))
    target = tmp_path / "target.json"
    if content in ("good", "other"):
        given = made(RULES["mup"], 2.0)
        segments = tuple(dataclasses.replace(x, name="net." + x.name) for x in given.segments)
        written(target, given if content == "good" else dataclasses.replace(given, segments=segments))
    elif content is not None:
        target.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *([] if content == "alone" else [proxy]), str(target), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert content in ("good", "other") or "target.json" in error


def test_a_monitored_run_is_compared_with_its_wider_self(tmp_path, device):
    """The whole way from param_groups to the exit code. Gradients are noise and 3 tau have passed, so nothing has drifted."""
    paths = []
    for width in (16, 32):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(2))).to(device)
        groups = param_groups(model, 16, "kosson2025", roles={"*.weight": "matrix"}, width=width)
        optimizer = AdamW(groups, lr=4e-2, weight_decay=2.0, betas=(0.9, 0.95))
        monitor = lwadamw.Monitor(optimizer, model, every=5, spectrum_every=0)
        watch = None
        if paths:
            watch = DriftWatch(paths[0])
            monitor.on_reading.append(watch)
        for _ in range(50):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        paths.append(str(tmp_path / f"{width}.json"))
        monitor.save(paths[-1], width=width)
    found = compare(*map(load, paths))
    assert {row.verdict for row in found.findings} == {"as predicted"}
    assert {row.statistic for row in found.findings} == {"weight_rms", "relative_update", "rotation"}
    assert main(["compare", *paths]) == 0
    assert not watch.warned


def test_the_help_says_the_tolerance_that_is_used(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert f"default: {COMPARE_TOLERANCE}," in " ".join(capsys.readouterr().out.split())
