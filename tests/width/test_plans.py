"""`python -m lwadamw rule` plans width, depth, batch size, tokens and parameters together."""

import json
import re

import pytest

import lwadamw
from lwadamw import RECIPES, RULES, AdamW
from lwadamw.commands import main
from lwadamw.width.laws import LAWS, Length, factors
from lwadamw.width.plans import PLACES, Plan, by_law
from lwadamw.width.targets import Base
from tests import zoo

BASE = Base(64, lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
PROXY = Length(1000, 2**16, 10**6)
TARGET = Length(6000, 2**18, 32 * 10**6)
M_B, M_D, M_P = 4.0, 24.0, 32.0


def tau_of_run(lr, wd, run):
    """B / (lr wd D) of Wang & Aitchison and of Bergsma et al., in their letters."""
    return run.batch_tokens / (lr * wd * run.steps * run.batch_tokens)


def test_the_constant_tau_law_keeps_tau_as_a_share_of_the_run():
    by = factors(LAWS["constant_tau"], PROXY, TARGET)
    assert (by.lr, by.eps, by.beta) == (1.0, 1.0, 1.0)
    assert tau_of_run(4e-3, 0.1 * by.wd, TARGET) == pytest.approx(tau_of_run(4e-3, 0.1, PROXY))


def test_power_lines_gives_tau_its_power_of_tokens_per_parameter():
    """tau_opt = c TPP^-0.52 and lambda_opt = B / (tau_opt eta D), Bergsma et al. 2505.13738."""
    by = factors(LAWS["power_lines"], PROXY, TARGET)
    c, eta, best = 0.7, 4e-3, []
    for run in (PROXY, TARGET):
        batch, tokens = run.batch_tokens, run.steps * run.batch_tokens
        tau = c * (tokens / run.parameters) ** -0.52
        best.append(batch / (tau * eta * tokens))
    assert by.wd == pytest.approx(best[1] / best[0])
    assert by.lr == 1.0


def test_complete_d_p_is_its_table():
    """lr and wd times sqrt(m_B/m_D), eps times sqrt(m_D/m_B), 1 - beta times m_B/m_D, 2512.22382, Table 1."""
    by = factors(LAWS["completedp"], PROXY, TARGET)
    assert by == pytest.approx(((M_B / M_D) ** 0.5, (M_B / M_D) ** 0.5, (M_D / M_B) ** 0.5, M_B / M_D))


def test_nanochat_is_its_code():
    """lr times sqrt(B / B_ref) and lambda times sqrt(B / B_ref) D_ref / D."""
    by = factors(LAWS["nanochat"], PROXY, TARGET)
    assert by == pytest.approx((M_B**0.5, M_B**0.5 / M_D, 1.0, 1.0))


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_if_only_the_batch_changes_every_law_gives_lr_times_decay_proportional_to_it(law):
    # The tokens are the same, so there are fewer steps.
    by = factors(law, Length(4000, 1000, 10), Length(1000, 4000, 10))
    assert by.lr * by.wd == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("law", "power"), [("constant_tau", -1), ("power_lines", -0.48), ("completedp", -1), ("nanochat", -1)]
)
def test_if_only_the_tokens_change_the_laws_disagree_as_their_sources_do(law, power):
    by = factors(LAWS[law], Length(1000, 1000, 10), Length(8000, 1000, 10))
    assert by.lr * by.wd == pytest.approx(8.0**power)


def test_every_law_says_what_it_holds_where_it_is_from_and_how_firmly_it_is_known():
    for law in LAWS.values():
        assert law.holds
        assert law.source
        assert law.known


def test_a_plan_multiplies_law_width_and_depth():
    plan = Plan(RECIPES["completep"], BASE, 256, 2, 8, PROXY, TARGET, LAWS["completedp"])
    root = (M_B / M_D) ** 0.5
    assert plan.typed("matrix") == pytest.approx((4e-3 * root / 4, 0.1 * root * 4, 1e-8 / root / 4 / 4))
    assert plan.typed("block_vector") == pytest.approx((4e-3 * root, 0.0, 1e-8 / root / 4 / 4))
    assert plan.typed("vector") == pytest.approx((4e-3 * root, 0.0, 1e-8 / root))
    assert plan.betas == pytest.approx((1 - 0.1 / 6, 1 - 0.05 / 6))
    assert plan.branch == 0.25
    lr, wd, _ = plan.typed("matrix")
    assert plan.tau_shares == pytest.approx((tau_of_run(4e-3, 0.1, PROXY), tau_of_run(lr, wd, TARGET)))
    assert plan.tau_shares[0] == pytest.approx(plan.tau_shares[1])


def test_the_optimizer_of_the_printed_python_uses_the_planned_values(capsys):
    assert main([*COMMAND, "--law", "completedp"]) == 0
    printed = capsys.readouterr().out
    _, groups, optimizer = re.search(r"In Python:\n(.*)\n", printed, re.DOTALL)[0].split("\n")[:3]
    scope = {"lwadamw": lwadamw, "model": zoo.Llama(256, 8)}
    exec(groups.strip() + "\n" + optimizer.strip(), scope)
    plan = Plan(RECIPES["completep"], BASE, 256, 2, 8, PROXY, TARGET, LAWS["completedp"])
    assert isinstance(scope["optimizer"], AdamW)
    for group, values in zip(scope["optimizer"].param_groups, scope["optimizer"].effective(), strict=True):
        names = group["param_names"]
        place = "output" if group["role"] == "output" else "matrix" if group["role"] == "matrix" else "vector"
        if place == "vector" and names[0].startswith("layers."):
            place = "block_vector"
        assert (values["lr"], values["weight_decay"], values["eps"]) == pytest.approx(plan.typed(place), rel=1e-5)
        assert group["betas"] == pytest.approx(plan.betas, rel=1e-5)


COMMAND = [
    "rule", "completep", "--from", "64", "--to", "256", "--lr", "4e-3", "--wd", "0.1", "--base-depth", "2", "--depth", "8",
    "--base-steps", "1000", "--steps", "6000", "--base-batch-tokens", "65536", "--batch-tokens", "262144",
    "--base-parameters", "1000000", "--parameters", "32000000",
]  # fmt: skip


def test_the_command_prints_the_plan(capsys):
    assert main([*COMMAND, "--law", "power_lines"]) == 0
    text = capsys.readouterr().out
    lines = {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in text.splitlines()}
    assert lines["blocks"] == ["2", "8", "4"]
    assert lines["tokens"] == ["65,536,000", "1,572,864,000", "24"]
    decay = 0.1 * 4 * (M_B / M_D) * (M_D / M_P) ** 0.52
    assert lines["matrices"][:3] == ["0.001", f"{decay:.6g}", "6.25e-10"]
    assert float(lines["tau of matrices / run"][2]) == pytest.approx((M_D / M_P) ** -0.52, rel=1e-3)
    assert "residual branch by 0.25" in text
    assert "multiply the logits by 0.25" in text
    for law in LAWS.values():
        assert law.source in text.replace("\n", " ")


def test_the_command_gives_the_plan_as_json(capsys):
    assert main([*COMMAND, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert set(plan["places"]) == set(PLACES)
    assert plan["branch"] == 0.25
    assert any("no law is chosen" in warning for warning in plan["warnings"])


def test_without_new_arguments_the_command_is_about_the_width_alone(capsys):
    assert main(["rule", "--from", "64", "--to", "256", "--lr", "4e-3", "--wd", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "Plan:" not in text
    assert "Only the width is scaled here" in text


def test_a_law_that_holds_tau_warns_under_a_rule_that_lets_tau_follow_the_width():
    plan = Plan(RULES["fan2025"], BASE, 256, base_length=PROXY, length=TARGET, law=LAWS["constant_tau"])
    assert plan.tau_shares[1] == pytest.approx(2 * plan.tau_shares[0])
    assert any("lets lr*wd of the matrices follow m^-0.5" in warning for warning in plan.warnings())
    held = Plan(RULES["kosson2025"], BASE, 256, base_length=PROXY, length=TARGET, law=LAWS["constant_tau"])
    assert not any("lets lr*wd" in warning for warning in held.warnings())


def test_tokens_per_parameter_outside_of_the_fit_warn():
    short = Length(100, 1000, 10**6)
    plan = Plan(RULES["kosson2025"], BASE, 256, base_length=PROXY, length=short, law=LAWS["power_lines"])
    assert any("The target has 0.1 tokens per parameter" in warning for warning in plan.warnings())


def test_a_law_without_the_parameters_it_needs_has_no_row():
    plan = Plan(RULES["kosson2025"], BASE, 256, base_length=Length(10, 10), length=Length(20, 10))
    assert by_law(plan)["power_lines"] is None
    assert by_law(plan)["constant_tau"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_depth": 2}, "give both base_depth and depth"),
        ({"base_depth": 2, "depth": 0}, "depth=0 is not a positive number"),
        ({"base_depth": 2, "depth": 4}, "'kosson2025' says nothing of another depth"),
        ({"length": TARGET}, "give the run of the proxy and that of the target"),
        ({"law": LAWS["nanochat"]}, "'nanochat' needs the run of the proxy"),
        ({"rule": RECIPES["completep"]}, "'completep' scales the depth"),
        (
            {"base_length": Length(4000, 100), "length": Length(100, 100), "law": LAWS["completedp"]},
            "gives 1 - beta = 4 for beta = 0.9, which is more than 1",
        ),
        (
            {"base_length": Length(10, 10), "length": Length(10, 10), "law": LAWS["power_lines"]},
            "Give the number of parameters of both",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(**{"rule": RULES["kosson2025"], "base": BASE, "width": 256, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-depth", "2"], "argument --base-depth: it needs --depth too"),
        (["--parameters", "2"], "argument --parameters: it needs --base-parameters too"),
        (["--law", "nanochat"], "argument --law: it needs --base-steps and --base-batch-tokens and --steps"),
        (["--base-depth", "2", "--depth", "4"], "says nothing of another depth"),
        (["--base-depth", "-2", "--depth", "4"], "--base-depth"),
    ],
)
def test_arguments_that_give_no_plan_end_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rule", "kosson2025", "--from", "64", "--to", "256", "--lr", "4e-3", "--wd", "0.1", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
