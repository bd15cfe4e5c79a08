"""The command `rule` prints the values that the optimizer then uses at another width."""

import inspect
import json
import math
import re

import pytest
import torch

import lwadamw
from lwadamw import RULES, Rule, Scale, param_groups
from lwadamw.commands import main
from lwadamw.width.targets import Base, Horizon, Target
from tests import zoo

# Exponents of lr and weight decay as the papers state them.
EXPONENTS = {"standard": (0, 0), "mup": (-1, 0), "fan2025": (-1, 0.5), "kosson2025": (-1, 1), "balanced": (-0.75, 0.75)}
INVARIANT = {"fan2025": ["top"], "kosson2025": ["tau", "update"], "balanced": ["tau", "update", "top"]}


def random_base(width=256):
    lr, weight_decay = torch.rand(2, dtype=torch.float64).tolist()
    return Base(width, lr=10 ** (2 * lr - 4), weight_decay=10 ** (2 * weight_decay - 2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [16, 256, 300, 4096])
def test_values_and_ratios_follow_the_exponents_of_the_rule(rule, width):
    base = random_base()
    target, m, (a, b) = Target(RULES[rule], base, width), width / 256, EXPONENTS[rule]
    lr, wd = base.lr * m**a, base.weight_decay * m**b
    matrix, vector, output = (target.values(role) for role in ("matrix", "vector", "output"))
    assert (matrix.lr, matrix.weight_decay) == pytest.approx((lr, wd))
    assert matrix.decay_per_step == pytest.approx(base.lr * base.weight_decay * m ** (a + b))
    assert (vector.lr, vector.weight_decay) == (base.lr, 0)
    assert (output.lr, output.weight_decay) == pytest.approx((base.lr if rule == "standard" else base.lr / m, 0))
    assert target.steady.tau == pytest.approx(1 / (lr * wd))
    assert target.steady.weight_rms == pytest.approx(math.sqrt(lr / (2 * wd)))
    assert target.steady.relative_update == pytest.approx(math.sqrt(2 * lr * wd / 19))  # (1 - .9)/(1 + .9)
    assert target.tau_ratio == pytest.approx(m ** -(a + b))
    assert target.rms_ratio == pytest.approx(m ** ((a - b) / 2))
    assert target.update_ratio == pytest.approx(m ** ((a + b) / 2))
    assert target.top_ratio == pytest.approx(m ** ((a - b) / 2 + 0.75))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_the_quantities_it_names_and_no_other(rule):
    target = Target(RULES[rule], random_base(), 2048)
    ratios = {"tau": target.tau_ratio, "rms": target.rms_ratio, "update": target.update_ratio, "top": target.top_ratio}
    held = [name for name, ratio in ratios.items() if ratio == pytest.approx(1)]
    assert held == ({"standard": ["tau", "rms", "update"], "mup": []} | INVARIANT)[rule]


@pytest.mark.parametrize("rule", RULES)
def test_the_optimizer_uses_the_planned_values(rule):
    base = random_base(16)
    optimizer = lwadamw.AdamW(
        param_groups(zoo.Llama(64, 1), 16, rule), lr=base.lr, weight_decay=base.weight_decay, eps=base.eps
    )
    target = Target(RULES[rule], base, 64)
    seen = {g["role"]: e for g, e in zip(optimizer.param_groups, optimizer.effective(), strict=True)}
    for role, effective in seen.items():
        planned = target.values(role)
        assert (effective["lr"], effective["weight_decay"]) == pytest.approx((planned.lr, planned.weight_decay))
    assert set(seen) == {"matrix", "vector", "output"}


def test_a_step_of_torchs_adamw_takes_decay_per_step_off_the_weights():
    planned = Target(RULES["fan2025"], random_base(), 1024).values("matrix")
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    before, p.grad = p.detach().clone(), torch.zeros_like(p)
    torch.optim.AdamW([p], lr=planned.lr, weight_decay=planned.weight_decay).step()
    torch.testing.assert_close(p.detach(), before * (1 - planned.decay_per_step), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("steps", "reached"), [(2999, False), (3000, True)])
def test_a_run_of_three_tau_reaches_the_steady_state(steps, reached):
    horizon = Horizon(steps)
    assert horizon.reaches(1000.0) is reached
    assert horizon.share(1000.0) == pytest.approx(1000 / steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Base(256, lr=0.0, weight_decay=0.1), "Base: lr=0.0 is not a positive number"),
        (lambda: Base(256, lr=1e-3, weight_decay=math.nan), "Base: weight_decay=nan is not"),
        (lambda: Base(0, lr=1e-3, weight_decay=0.1), "Base: width=0 is not"),
        (lambda: Base(256, 1e-3, 0.1, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) are not both in"),
        (lambda: Base(256, 1e-3, 0.1, eps=-1.0), "eps=-1.0 is not a finite number >= 0"),
        (lambda: Horizon(0), "Horizon: steps=0 is not"),
        (lambda: Horizon(10, -5), "Horizon: batch_tokens=-5 is not"),
        (
            lambda: Target(Rule("mine", Scale(), output=Scale(lr=-2000, wd=None)), random_base(), 512),
            "leaves the range",
        ),
        (lambda: Target(RULES["mup"], random_base(), 0), "Target: width=0 is not"),
        (
            lambda: Target(Rule("mine", matrix=Scale(wd=None)), random_base(), 512),
            "'mine' gives matrices no weight decay",
        ),
        (lambda: Target(Rule("mine", matrix=Scale(lr=2000)), random_base(), 512), "m = 2 leaves the range of a float"),
        (lambda: Target(Rule("mine", matrix=Scale(lr=-2000)), random_base(), 512), "m = 2 leaves the range of a float"),
        (
            lambda: Target(Rule("mine", matrix=Scale(lr=-600, wd=-600)), random_base(), 512),
            "leaves the range of a float",
        ),
    ],
)
def test_values_that_give_no_plan_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


COMMAND = ["rule", "--from", "256", "--to", "4096", "--lr", "3e-3", "--wd", "0.1"]
RUN = ["--steps", "20000", "--batch-tokens", "524288"]


def printed(capsys, *arguments):
    assert main([*COMMAND, *arguments]) == 0
    return capsys.readouterr().out


def rows(text):
    """Return the cells of every line, by the first cell of the line."""
    found = {}
    for line in text.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        found.setdefault(name, cells)
    return found


def test_rule_prints_the_target_of_fan2025(capsys):
    found = rows(printed(capsys, "fan2025", *RUN))
    assert found["matrix"] == ["0.0001875 = base * m^-1", "0.4 = base * m^0.5", "7.5e-05 = base * m^-0.5"]
    assert found["vector"] == ["0.003", "0", "0"]
    assert found["output"] == ["0.0001875 = base * m^-1", "0", "0"]
    assert found["tau = 1/(lr wd), steps"] == ["3,333", "13,333", "4"]
    assert found["of a run of 20,000 steps"] == ["0.17", "0.67"]
    assert found["in tokens"] == ["1.748B", "6.991B"]  # 524288/3e-4, 524288/7.5e-5
    assert found["steady after 3 tau, steps (3)"] == ["10,000", "40,000: not in this run"]
    assert found["weight RMS sqrt(lr/2wd)"] == ["0.122", "0.0153", "0.125"]
    assert found["relative update per step sqrt(2 lr wd (1-b1)/(1+b1))"] == ["0.00562", "0.00281", "0.5"]
    assert found["top singular value, ~ weight RMS * width^0.75 (4)"] == ["1"]


def test_rule_prints_a_table_of_all_rules(capsys):
    found = rows(printed(capsys, "fan2025", *RUN))
    columns = ["lr", "wd", "lr*wd", "tau", "tau/run", "RMS", "update", "top"]
    assert found["rule"] == columns
    expected = {
        "standard": [0.003, 0.1, 3e-4, 3333, 0.17, 1, 1, 8],
        "mup": [1.875e-4, 0.1, 1.875e-5, 53333, 2.7, 0.25, 0.25, 2],
        "fan2025 *": [1.875e-4, 0.4, 7.5e-5, 13333, 0.67, 0.125, 0.5, 1],
        "kosson2025": [1.875e-4, 1.6, 3e-4, 3333, 0.17, 0.0625, 1, 0.5],
        "balanced": [3.75e-4, 0.8, 3e-4, 3333, 0.17, 0.125, 1, 1],
    }
    assert {name: [float(c.replace(",", "")) for c in found[name]] for name in expected} == expected


def test_rule_prints_its_limits_and_the_sources_of_its_remarks(capsys):
    text = " ".join(printed(capsys, *RUN).split())
    assert text.startswith("rule fan2025 ")  # fan2025 is the default.
    assert "Only the width is scaled here: depth, batch size and tokens" in text
    assert "2512.05620" in text
    assert "2505.13738" in text
    assert "tau/run of these matrices, effective: 0.67" in text
    assert (
        "From one rule to another: lr x16, weight decay x16, tau x16, relative update x4, top singular value x16"
        in text
    )
    assert "2505.13738" not in printed(capsys)  # This remark needs the length of the run.


@pytest.mark.parametrize("output", ["output", "vector"])
@pytest.mark.parametrize("which", [*([rule] for rule in RULES), ["--exponents", "lr=-0.3,wd=0.4,eps=-1"]], ids=str)
def test_the_code_that_rule_prints_runs_and_gives_the_same_values(which, output, capsys):
    text = printed(capsys, *which, "--output", output, "--betas", "0.8", "0.9", "--eps", "1e-12")
    with torch.device("meta"):
        model = zoo.Llama(4096, 1)
    calls = re.search(r"with base values:\n((?:  .*\n)+)", text).group(1)
    names = {"lwadamw": lwadamw, "model": model}
    exec(inspect.cleandoc(calls), names)
    theirs = re.search(r"kind \(1\), (.*):\n((?:  .*\n)+)", text)
    params = {g["role"]: g["params"] for g in names["optimizer"].param_groups}
    plain = eval(f"AdamW([{theirs.group(2)}], {theirs.group(1)})", {"AdamW": torch.optim.AdamW, **params})
    for group, ours, their in zip(
        names["optimizer"].param_groups,
        names["optimizer"].effective(),
        sorted(
            plain.param_groups, key=lambda g: [*params].index(next(r for r in params if params[r][0] is g["params"][0]))
        ),
        strict=True,
    ):
        assert group["betas"] == their["betas"] == (0.8, 0.9)
        assert [ours[key] for key in ("lr", "weight_decay", "eps")] == pytest.approx(
            [their[key] for key in ("lr", "weight_decay", "eps")], rel=1e-5
        )


@pytest.mark.parametrize("which", [["kosson2025"], ["--exponents", "lr=-0.6,wd=0.2"]], ids=str)
def test_rule_as_json_has_the_numbers_of_every_rule(which, capsys):
    document = json.loads(printed(capsys, *which, *RUN, "--json"))
    base, own = Base(256, 3e-3, 0.1), which[0] == "--exponents"
    expected = dict(RULES) | ({"own": Rule("own", matrix=Scale(-0.6, 0.2), holds="your exponents")} if own else {})
    assert document["rule"] == ("own" if own else "kosson2025")
    assert document["m"] == 16
    assert document["base"]["tau"] == pytest.approx(1 / 3e-4)
    assert document["run"] == {"steps": 20000, "batch_tokens": 524288}
    assert document["rules"].keys() == expected.keys()
    for name, rule in expected.items():
        target = Target(rule, base, 4096)
        assert document["rules"][name] == target.as_dict(Horizon(20000, 524288))
        assert document["rules"][name]["tau_of_run"] == pytest.approx(target.steady.tau / 20000)
        assert document["rules"][name]["reaches_steady_state"] is (3 * target.steady.tau <= 20000)
    assert "run" not in json.loads(printed(capsys, "--json"))


def test_rule_all_prints_the_page_of_every_rule(capsys):
    titles = re.findall(r"^rule (\w+)   width", printed(capsys, "--all"), re.MULTILINE)
    assert titles == list(RULES)
    assert re.findall(r"^rule (\w+)   width", printed(capsys, "mup"), re.MULTILINE) == ["mup"]


def test_rule_prints_eps_only_if_the_rule_scales_it(capsys):
    assert rows(printed(capsys, "--exponents", "lr=-1,wd=1,eps=-1"))["matrix"][-1] == "6.25e-10 = base * m^-1"
    assert not re.search(r"\beps\b", printed(capsys, "--exponents", "lr=-1,wd=1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fan2026"], "unknown rule 'fan2026'. Closest: 'fan2025'"),
        (["mup", "--exponents", "lr=-1"], "--exponents: they are in place of a rule. Leave out 'mup'"),
        (["--exponents", "lr=-1,lr=0"], "'lr=-1,lr=0' is not a list of exponents"),
        (["--exponents", "momentum=1"], "'momentum=1' is not a list of exponents"),
        (["--exponents", "lr=x"], "'lr=x' is not a list of exponents"),
        (["--exponents", "wd=inf"], "exponent wd=inf is not finite"),
        (["--exponents", "lr=900"], "leaves the range of a float"),
        (["--batch-tokens", "1000"], "--batch-tokens: it needs --steps"),
        (["--betas", "0.9", "1"], "betas=(0.9, 1.0) are not both in [0, 1)"),
        (["--wd", "0"], "--wd: '0' is not a positive number"),
        (["--to", "1e3"], "--to: '1e3' is not a positive whole number"),
    ],
    ids=str,
)
def test_rule_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*COMMAND, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
