"""Real runs of a Hugging Face LLaMA at widths 64 and 256: good ones pass, bad ones fail, and the watch knows them apart."""

import itertools
import warnings

import pytest

from lwadamw import DriftWarning, DriftWatch
from lwadamw.commands import main
from tests.fixtures.write_llama import FAULT
from tests.monitor import llama

RULES = ("fan", "kosson")
CLAIMS = {"fan": "fan2025 claims that top and gain", "kosson": "kosson2025 claims that relative_update and rotation"}
PROXIES = [seeds for count in (1, 2) for seeds in itertools.combinations("01", count)]
WRONG = [("fan", "standard"), ("kosson", "standard"), ("fan", "wrong"), ("fan", "lost")]
WHY = {
    "standard": "the target ran under standard, and its fan_in is 4 times as large",
    "wrong": "the fan_in grew by 4, but the rule scaled by m = 2. Check base_width",
    "lost": "so the values are not those of the rule",
}


def compared(capsys, proxies, target):
    """Return the exit code of the command and the first line that it prints."""
    code = main(["compare", *map(llama.path, proxies), llama.path(target)])
    return code, capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("seeds", PROXIES, ids="".join)
@pytest.mark.parametrize("rule", RULES)
def test_the_rules_own_pair_passes(rule, seeds, capsys):
    for target in "01":
        code, line = compared(capsys, [f"{rule}-64-{seed}" for seed in seeds], f"{rule}-256-{target}")
        assert code == 0
        assert line.startswith(f"held: {CLAIMS[rule]} stay equal; ")
        assert "in 7 kinds of matrices (median x" in line


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rule", RULES)
def test_two_seeds_of_one_width_pass(rule, width, capsys):
    for pair in ("01", "10"):
        code, line = compared(capsys, [f"{rule}-{width}-{pair[0]}"], f"{rule}-{width}-{pair[1]}")
        assert (code, line[:6]) == (0, "held: ")


@pytest.mark.parametrize("seeds", PROXIES, ids="".join)
@pytest.mark.parametrize(("rule", "fault"), WRONG)
def test_no_scaling_a_wrong_base_width_and_lost_multipliers_fail_with_the_reason(rule, fault, seeds, capsys):
    for target in "0" if fault == "lost" else "01":
        code, line = compared(capsys, [f"{rule}-64-{seed}" for seed in seeds], f"{fault}-256-{target}")
        assert code == 1
        assert line.startswith(f"not held: {CLAIMS[rule]} stay equal")
        assert WHY[fault] in line


@pytest.mark.parametrize("fault", ["standard", "wrong"])
def test_the_weights_alone_give_a_bad_run_away(fault, monkeypatch):
    """Also where neither a rule's name nor a width ratio says anything, as after an import of the values."""
    from lwadamw.monitor import claims
    from lwadamw.monitor.comparison import compare
    from lwadamw.monitor.profile_file import load

    monkeypatch.setattr(claims, "_reason", lambda *_: ("", False))
    for proxy, target in itertools.product("01", repeat=2):
        found = compare(load(llama.path(f"fan-64-{proxy}")), load(llama.path(f"{fault}-256-{target}"))).claim
        assert (found.held, found.certain) == (False, False)
        assert "learning rates and weight decays predict x" in found.sentence


def told(references, target):
    """Return the step of every warning that a watch gives on a run, and its text."""
    watch = DriftWatch(references)
    found = []
    for reading in llama.readings(target):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            watch(reading)
        found += [(reading.step, str(w.message)) for w in caught]
    return found


@pytest.fixture(scope="module")
def proxies():
    return {f"{rule}-64-{seed}": llama.profile(f"{rule}-64-{seed}") for rule in RULES for seed in "01"}


@pytest.mark.parametrize("seeds", PROXIES, ids="".join)
@pytest.mark.parametrize("rule", RULES)
def test_the_watch_is_silent_in_good_runs(rule, seeds, proxies):
    references = [proxies[f"{rule}-64-{seed}"] for seed in seeds]
    for width, seed in itertools.product((64, 256), "01"):
        assert told(references, f"{rule}-{width}-{seed}") == []


@pytest.mark.parametrize("seeds", PROXIES, ids="".join)
@pytest.mark.parametrize(("rule", "fault"), WRONG)
def test_the_watch_warns_within_50_steps_of_the_fault(rule, fault, seeds, proxies):
    references = [proxies[f"{rule}-64-{seed}"] for seed in seeds]
    for target in "0" if fault == "lost" else "01":
        ((step, message),) = told(references, f"{fault}-256-{target}")
        begin = FAULT if fault == "lost" else 0
        assert begin < step <= begin + 50
        assert WHY[fault] in message


def test_the_watch_warns_of_a_run_that_lost_its_weight_decay(proxies):
    watch = DriftWatch(proxies["fan-64-0"])
    (*_, last) = llama.readings("fan-256-0")
    last.weight_decay[:] = 0.0
    with pytest.warns(DriftWarning, match="the target has no weight decay in .*, and the proxy has"):
        watch(last)
