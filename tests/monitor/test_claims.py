"""One line says whether a run held what its rule claims, and two seeds say how much runs differ when nothing is wrong."""

import dataclasses
import math
from pathlib import Path

import pytest

from lwadamw import RECIPES, RULES, Rule, Scale
from lwadamw.commands import main
from lwadamw.monitor.calibration import ONE_KIND, PER_OCTAVE, Calibration, student
from lwadamw.monitor.comparison import compare
from tests.fixtures import write_widths
from tests.monitor.profiles import made, written

FAN = RULES["fan2025"]


def claim(proxy, target):
    return compare(proxy, target).claim


@pytest.mark.parametrize("name", ["mup", "fan2025", "kosson2025", "balanced", "completep"])
def test_every_rule_holds_its_claim_in_its_own_pair_and_standard_and_a_wrong_base_width_do_not(name):
    rule = {**RULES, **RECIPES}[name]
    proxy = made(rule, 1.0)
    # muP claims that activations change equally. This is so if the alignment ratio grows with the root of the width.
    aligned = {(kind, "representation_change"): 2.0 for kind in ("attention.qkv", "ffn.down")} if name == "mup" else {}
    held = claim(proxy, made(rule, 4.0, factors=aligned))
    assert held.held is True
    assert held.sentence.startswith(f"held: {name} claims that ")
    wrong = claim(proxy, made(rule, 2.0, width=4.0, factors=aligned))
    assert (wrong.held, wrong.certain) == (False, True)
    assert wrong.sentence.endswith("the fan_in grew by 4, but the rule scaled by m = 2. Check base_width")
    standard = claim(proxy, made(RULES["standard"], 4.0))
    assert standard.held is False
    assert standard.sentence.endswith("the target ran under standard, and its fan_in is 4 times as large")
    assert "\n" not in held.sentence + wrong.sentence + standard.sentence


def test_what_was_not_held_is_named_with_its_layers_and_cause():
    off = {("ffn.down", "gain"): 3.0}
    found = claim(made(FAN, 1.0), made(FAN, 4.0, factors=off))
    assert found.sentence.startswith("not held: fan2025 claims that top and gain stay equal, but gain changed by x")
    assert "in 1 of 2 kinds of matrices (layers.*.ffn.down.weight): " in found.sentence
    assert found.sentence.endswith("are those of the rule, and the weights did not follow them")
    own = dataclasses.replace(made(Rule("x", matrix=Scale(lr=-0.5, wd=0.5)), 4.0), rule="fan2025")
    assert "weight decays predict x1.41, so the values are not" in claim(made(FAN, 1.0), own).sentence


def _with_kinds(given, count, factor=1.0):
    """Return a profile with `count` kinds of matrices, the first of which has `factor` times the top singular value."""
    first = given.segments[0]
    kinds = [
        dataclasses.replace(
            first,
            name=f"layers.0.kind{i}.weight",
            values={**first.values, "top": first.values["top"] * (1.0 if i else factor)},
        )
        for i in range(count)
    ]
    return dataclasses.replace(given, segments=tuple(kinds))


@pytest.mark.parametrize(
    ("width", "limit"),
    [(1.0, 1.35 * 1.25), (2.0, 1.35 * 1.25 * 1.15), (4.0, 1.35 * 1.25 * 1.15**2), (8.0, 1.35 * 1.25 * 1.15**3)],
)
def test_a_single_kind_of_five_may_be_off_by_a_factor_that_grows_with_the_octaves_and_by_no_more(width, limit):
    """The median of the kinds is as the rule claims. The single kind decides, in both directions."""
    proxy, target = _with_kinds(made(FAN, 1.0, noise=0.0), 5), made(FAN, width, noise=0.0)
    for factor in (limit, 1 / limit):
        within, beyond = factor**0.99, factor**1.01
        assert claim(proxy, _with_kinds(target, 5, within)).held is True
        found = claim(proxy, _with_kinds(target, 5, beyond))
        assert found.held is False
        assert "top changed by x" in found.sentence
        assert "in 1 of 5 kinds of matrices (layers.*.kind0.weight): " in found.sentence


def test_two_runs_under_standard_hold_nothing_if_the_width_grows():
    standard = RULES["standard"]
    found = claim(made(standard, 1.0), made(standard, 4.0))
    assert found.held is False
    assert "standard claims nothing, and top and gain should stay equal, but top changed by x2.8" in found.sentence
    assert claim(made(standard, 1.0), made(standard, 1.0, seed=1)).held is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taus": 1.0}, "it is too early"),
        ({"base": {"lr": 1.0, "weight_decay": 0.5}}, "for equal base values, and the base lr is 0.003 and 1"),
        ({"rule": "own"}, "nothing is known of the claims of 'own'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_known_is_said_and_is_no_failure(change, message):
    if "taus" in change:
        pair = made(FAN, 1.0), made(FAN, 4.0, **change)
    else:
        pair = made(FAN, 1.0), dataclasses.replace(made(FAN, 4.0), **change)
    pair = (dataclasses.replace(pair[0], rule="own"), pair[1]) if "rule" in change else pair
    found = compare(*pair)
    assert found.claim.held is None
    assert message in found.claim.sentence
    assert not found.failed


def test_a_schedule_that_the_weights_follow_slowly_is_not_held_against_the_rule():
    """The learning rate has fallen by 16. The weights of the proxy have followed, those of the target have not."""

    def lagging(given, lag):
        segments = []
        for x in given.segments[:-1]:
            steady = math.sqrt(x.lr / x.weight_decay / 16)
            values = {"steady_rms": steady, "expected_rms": lag * steady, "top": lag / 4 * x.values["top"]}
            segments.append(dataclasses.replace(x, lr=x.lr / 16, values=values))
        return dataclasses.replace(given, segments=tuple(segments))

    found = compare(lagging(made(FAN, 1.0), 1.0), lagging(made(FAN, 4.0), 2.0), statistics=["top"])
    assert {round(row.ratio) for row in found.findings} == {2}
    assert found.claim.held is True


def test_two_seeds_calibrate_the_tolerance_so_that_a_third_passes_and_a_wrong_rule_fails(tmp_path, capsys):
    def path(name, *args, **kwargs):
        return written(tmp_path / f"{name}.json", made(*args, noise=0.1, **kwargs))

    seeds = [path(f"seed{i}", FAN, 1.0, depth=1, seed=i) for i in range(40)]
    alarms = sum(main(["compare", *seeds[i : i + 3]]) for i in range(0, 39, 3))
    single = sum(main(["compare", *seeds[i : i + 2]]) for i in range(0, 40, 2))
    assert alarms <= 2
    assert single <= 1
    assert "from the spread of 2 proxies" in capsys.readouterr().out
    assert main(["compare", *seeds[:2], path("standard", RULES["standard"], 4.0, depth=1, seed=50)]) == 1
    assert main(["compare", *seeds[:2], path("target", FAN, 4.0, depth=1, seed=50)]) == 0


def test_proxies_of_several_widths_calibrate_around_the_law():
    some = [made(FAN, m, noise=0.0) for m in (1.0, 2.0, 4.0)]
    found = compare(some, made(FAN, 16.0, noise=0.0))
    assert found.calibration == (
        "tolerance 1.35 for the median, 2.57 for one kind, more than the spread of 3 proxies asks for"
    )
    assert {row.verdict for row in found.findings if row.role == "matrix"} == {"as predicted"}


def test_a_type_gets_at_least_the_factor_between_its_own_proxies():
    """Among many types that do not differ, so that the pooled noise is small."""
    (segment, *_) = made(FAN, 1.0).segments
    keys = [("matrix", f"w{i}") for i in range(40)]
    pair = [{key: [dataclasses.replace(segment, values={"top": 1.0})] for key in keys} for _ in range(2)]
    pair[1][keys[0]] = [dataclasses.replace(segment, values={"top": 3.0})]
    both = Calibration(pair, ["top"], 1.25, 3)
    assert both.tolerance(keys[0], "top") == pytest.approx(3)
    assert both.tolerance(keys[1], "top") < 2.5
    assert Calibration(pair[:1], ["top"], 1.25, 3).tolerance(keys[0], "top") == 1.25 * ONE_KIND


def test_a_single_type_may_be_off_by_more_than_the_median_and_the_more_the_wider_the_target():
    alone = [Calibration([{}], ["top"], 1.3, 3, octaves).tolerance(("matrix", "w"), "top") for octaves in (0, 1, 2)]
    assert alone == pytest.approx([1.3 * ONE_KIND * PER_OCTAVE**octaves for octaves in (0, 1, 2)])
    assert Calibration([{}], ["top"], 1.3, 3, 2).of_median("top") == 1.3


def test_the_median_decides_so_one_kind_alone_passes_and_all_kinds_together_fail():
    kinds = [("attention.qkv", "top"), ("ffn.down", "top")]
    one = claim(made(FAN, 1.0), made(FAN, 4.0, factors={kinds[0]: 1.6}))
    both = claim(made(FAN, 1.0), made(FAN, 4.0, factors=dict.fromkeys(kinds, 1.6)))
    assert (one.held, both.held) == (True, False)
    assert "top changed by x1.6" in both.sentence
    assert "in 2 of 2 kinds" in both.sentence
    uneven = claim(made(FAN, 1.0), made(FAN, 4.0, factors={kinds[0]: 1.5, kinds[1]: 2.0})).sentence
    assert "(layers.*.ffn.down.weight, layers.*.attention.qkv.weight)" in uneven, "the worst kind comes first"


def test_a_kind_that_lost_its_weight_decay_is_named():
    target = made(FAN, 4.0)
    lost = [dataclasses.replace(x, weight_decay=0.0) if "ffn" in x.name else x for x in target.segments]
    found = claim(made(FAN, 1.0), dataclasses.replace(target, segments=tuple(lost)))
    assert (found.held, found.certain) == (False, True)
    assert found.sentence.endswith("the target has no weight decay in layers.*.ffn.down.weight, and the proxy has")


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.999, 3, 10.215),
        (0.999, 10, 4.144),
        (0.975, 99, 1.984),
    ],
)
def test_students_quantile(probability, freedom, expected):
    assert student(probability, freedom) == pytest.approx(expected, rel=0.1 if freedom == 3 else 0.01)


def test_weights_that_are_not_finite_fail_and_are_named_first(tmp_path, capsys):
    good = made(FAN, 4.0)
    broken = [
        dataclasses.replace(x, values={**x.values, "weight_rms": math.nan}) if "layers.1.ffn" in x.name else x
        for x in good.segments
    ]
    proxy = written(tmp_path / "proxy.json", made(FAN, 1.0))
    nan = written(tmp_path / "nan.json", dataclasses.replace(good, segments=tuple(broken)))
    for pair in ([proxy, nan], [nan, proxy], [proxy, proxy, nan], [proxy, nan, "--statistic", "top"]):
        assert main(["compare", *pair]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "not finite: some weights are NaN or infinite in layers.*.ffn.down.weight"
        assert any(line.startswith("matrix  layers.*.ffn.down.weight") and "not finite" in line for line in lines)


def test_a_layer_that_is_all_zero_shrank():
    target = made(FAN, 4.0, factors={("ffn.down", "weight_rms"): 0.0})
    (row,) = compare(made(FAN, 1.0), target).drifted
    assert (row.layers, row.statistic, row.verdict) == ("layers.*.ffn.down.weight", "weight_rms", "shrank")
    assert [r.verdict for r in compare(target, made(FAN, 4.0)).drifted] == ["grew"]


def trained(*names):
    """Return the paths of profiles of real runs, which tests/fixtures/write_widths.py made."""
    return [str(Path(write_widths.__file__).parent / "widths" / f"{name}.json") for name in names]


@pytest.mark.parametrize("target", ["c", "target", "target1"])
def test_real_runs_under_their_rule_pass_with_two_seeds_as_proxies(target, capsys):
    assert main(["compare", *trained("a", "b", target)]) == 0
    assert capsys.readouterr().out.startswith(
        "held: fan2025 claims that top and gain stay equal; top and gain did in 5 kinds"
    )


@pytest.mark.parametrize(
    ("target", "why"), [("standard", "ran under standard"), ("wrong", "but the rule scaled by m = 2. Check base_width")]
)
def test_real_runs_without_scaling_or_with_a_wrong_base_width_fail(target, why, capsys):
    for proxies in ("a", "ab"):
        assert main(["compare", *trained(*proxies, target)]) == 1
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("not held: fan2025 claims that top and gain stay equal")
        assert why in first


@pytest.mark.parametrize("pair", ["ab", "ac", "bc", "ba", "ca", "cb"])
def test_a_real_second_seed_passes_with_one_proxy(pair):
    assert main(["compare", *trained(*pair)]) == 0
