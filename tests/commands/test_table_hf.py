"""`table --hf` builds a model and its proxy from a config of transformers, and prints code that makes the ratios shown."""

import json
import re
import shlex

import pytest

import lwadamw
from lwadamw.commands import main
from tests.commands.hf_cases import EXPERTS, PLAIN, SIGHTED, json_table, pasted, ratios, refusal, text_table

CASES = {
    "sighted": (SIGHTED, "SightedForConditionalGeneration", "SightedConfig", ["--base-width", "64", *EXPERTS]),
    "plain": (PLAIN, "PlainLMHeadModel", "PlainConfig", ["--base-width", "48"]),
    "shallow": (
        SIGHTED,
        "SightedForConditionalGeneration",
        "SightedConfig",
        ["--base-width=64", "--depth=3", *EXPERTS],
    ),
    "low_rank": (
        SIGHTED,
        "SightedForConditionalGeneration",
        "SightedConfig",
        ["--base-width=64", "--set", "text_config.q_lora_rank=3", *EXPERTS],
    ),
}


@pytest.mark.parametrize("rule", lwadamw.RULES)
@pytest.mark.parametrize("case", CASES)
def test_the_pasted_code_gives_the_ratios_of_the_table(case, rule, config, transformers, capsys):
    fields, model_class, config_class, arguments = CASES[case]
    found = json_table(capsys, config(**fields), *arguments, "--rule", rule)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)())
    evidence = pasted(found["code"], model).evidence
    shown = {row["name"]: (row["role"], row["fan_in"], row["m"]) for row in found["parameters"]}
    assert {name: (one.role, one.fan_in, one.m) for name, one in evidence.items()} == shown
    assert found["code"] in text_table(capsys, config(**fields), *arguments, "--rule", rule)


def test_the_pasted_code_carries_the_base_values(config, transformers, capsys):
    arguments = [config(**PLAIN), "--base-width", "48", "--lr", "3e-3", "--wd", "0.2", "--output", "vector"]
    found = json_table(capsys, *arguments)
    names = {"model": transformers.PlainLMHeadModel(transformers.PlainConfig()), "lwadamw": lwadamw}
    exec(found["code"], names)
    expected = {row["name"]: (row["lr"], row["weight_decay"]) for row in found["parameters"]}
    values = {}
    for group in names["optimizer"].param_groups:
        now = lwadamw.effective(group)
        values |= dict.fromkeys(group["param_names"], (float(now.lr), float(now.weight_decay)))
    assert values == expected
    assert 'output="vector"' in found["code"]


def test_ratios_are_those_of_the_true_fan_ins(config, capsys):
    m = ratios(json_table(capsys, config(**SIGHTED), "--base-width", "64", *EXPERTS))
    for layer, name in [(0, "q_a_proj.weight"), (0, "o_proj.weight"), (0, "down_proj.weight")]:
        assert m[f"layers.{layer}.{name}"] == 4
    assert m["layers.2.router.weight"] == m["layers.2.experts.gate_up_proj"] == m["lm_head.weight"] == 4
    assert m["layers.2.experts.down_proj"] == 4
    assert m["layers.0.q_b_proj.weight"] == 1  # a low rank stays
    assert m["projector.weight"] == 1  # the vision tower stays


def test_the_mapping_is_short(config, capsys):
    found = json_table(capsys, config(**SIGHTED), "--base-width", "64", *EXPERTS)
    assert found["base_width"] == {
        "projector.weight": 96,
        "layers.*.q_b_proj.weight": 24,
        "layers.*.down_proj.weight": 192,
        "layers.*.experts.down_proj": 16,
        "fc1.weight": 48,
        "*": 64,
    }
    assert found["roles"] == {"*.gate_up_proj": "matrix:-1", "*.experts.down_proj": "matrix:-1"}


def test_every_changed_field_is_shown_and_every_size_that_stays(config, capsys):
    out = text_table(capsys, config(**SIGHTED), "--base-width", "64", *EXPERTS)
    for field, old, new in [
        ("text_config.hidden_size", 256, 64),
        ("text_config.intermediate_size", 768, 192),
        ("text_config.moe_intermediate_size", 64, 16),
        ("text_config.num_attention_heads", 8, 2),
        ("text_config.num_key_value_heads", 4, 1),
        ("vision_config.out_hidden_size", 256, 64),
    ]:
        assert f"  {field}  {old} -> {new}\n" in out
    assert len(re.findall(r" -> ", out)) == 6
    assert "These sizes stay: text_config.head_dim 32, text_config.q_lora_rank 24." in out
    assert "nested configs stay as they are: vision_config." in out
    unknown = "text_config.mystery_size 40, projection_dim 256, vision_config.embed_dim 256"
    assert f"does not know them: {unknown}." in out
    assert re.search(
        r"Their m is not 4.*\n  1  fc1.weight\n  1  projector.weight\n  1  layers\.\*\.q_b_proj\.weight\n", out
    )
    assert "SightedForConditionalGeneration of transformers 5.0.standin" in out


def test_a_setting_wins_over_the_width_and_over_what_stays(config, capsys):
    settings = ["--set", "text_config.intermediate_size=96", "--set", "text_config.q_lora_rank=12"]
    found = json_table(capsys, config(**SIGHTED), "--base-width", "64", *settings, *EXPERTS)
    assert found["changed"]["text_config.intermediate_size"] == [768, 96]
    assert ratios(found)["layers.0.down_proj.weight"] == 8
    assert ratios(found)["layers.0.q_b_proj.weight"] == 2


def test_the_proxy_may_have_fewer_layers_than_the_model(config, capsys):
    found = json_table(capsys, config(**SIGHTED), "--base-width", "64", "--depth", "3", *EXPERTS)
    assert found["changed"]["text_config.num_hidden_layers"] == [6, 3]
    assert found["changed"]["text_config.layer_types"][1] == ["dense", "dense", "moe"]
    assert ratios(found) == ratios(json_table(capsys, config(**SIGHTED), "--base-width", "64", *EXPERTS))
    assert "layers.5.experts.down_proj" in ratios(found)
    without_experts = refusal(capsys, config(**SIGHTED), "--base-width", "64", "--depth", "2", *EXPERTS)
    assert "the base model has no parameter 'layers.2.router.weight'" in without_experts
    assert "--depth 2 limits the layers of the proxy: a higher one may help." in without_experts


def test_the_model_may_have_another_width_than_its_config(config, capsys):
    found = json_table(capsys, config(**SIGHTED), "--width", "512", "--base-width", "128", *EXPERTS)
    shapes = {row["name"]: row["shape"] for row in found["parameters"]}
    assert shapes["layers.0.down_proj.weight"] == [512, 1536]
    assert found["changed"]["text_config.num_attention_heads"] == [16, 4]
    assert ratios(found)["layers.0.o_proj.weight"] == 4
    assert "Give --width a multiple of 64." in refusal(capsys, config(**SIGHTED), "--width", "96", *EXPERTS)


def test_without_a_proxy_the_table_shows_roles_and_no_code(config, capsys):
    out = text_table(capsys, config(**PLAIN))
    assert "Give --base-width N" in out
    assert "param_groups" not in out
    found = json_table(capsys, config(**PLAIN))
    assert set(ratios(found).values()) == {1.0}
    assert "code" not in found


@pytest.mark.parametrize("width", [16, 32, 40, 48, 96, 100, 160, 250])
@pytest.mark.parametrize("fields", [SIGHTED, PLAIN], ids=["sighted", "plain"])
def test_the_remedies_for_sizes_that_are_not_whole_work_when_pasted(fields, width, config, capsys):
    path = config(**fields)
    roles = EXPERTS if fields is SIGHTED else []
    try:
        main(["table", "--hf", path, "--base-width", str(width), *roles])
        assert width % (64 if fields is SIGHTED else 16) == 0
        return
    except SystemExit:
        message = capsys.readouterr().err
    assert "do not come out whole" in message
    settings = shlex.split(re.search(r"for example (--set .*)\.\n", message).group(1))
    assert main(["table", "--hf", path, "--base-width", str(width), *settings, *roles]) == 0
    unit = re.search(r"Give --base-width a multiple of (\d+)", message).group(1)
    capsys.readouterr()
    assert main(["table", "--hf", path, "--base-width", unit, *roles]) == 0


def test_a_size_that_is_not_whole_is_named_with_its_value(config, capsys):
    message = refusal(capsys, config(**PLAIN), "--base-width", "100")
    assert "n_head=12 would be 6.25" in message
    assert "--set n_head=5" in message  # 100 has no 6 equal parts


def test_key_value_heads_keep_their_ratio_or_else_their_number(config, capsys):
    path = config(**SIGHTED, text_config={"num_key_value_heads": 1})
    found = json_table(capsys, path, "--base-width", "64", *EXPERTS)
    assert "text_config.num_key_value_heads" not in found["changed"]
    assert "text_config.num_key_value_heads stays 1: its share of the width would be 0.25" in found["notes"][0]
    assert found["notes"][0] in text_table(capsys, path, "--base-width", "64", *EXPERTS)
    message = refusal(capsys, config(**SIGHTED), "--base-width", "32", *EXPERTS)
    assert "text_config.num_key_value_heads=4 would be 0.5, and 4 does not divide 1 heads" in message


def test_the_rank_of_the_time_step_follows_only_where_it_is_a_sixteenth_of_the_width(config, capsys):
    found = json_table(capsys, config(**PLAIN), "--base-width", "48")
    assert found["changed"]["time_step_rank"] == [12, 3]
    assert ratios(found)["h.0.dt_proj.weight"] == 4
    found = json_table(capsys, config(**PLAIN, time_step_rank=8), "--base-width", "48")
    assert found["stays"] == {"time_step_rank": 8}
    assert ratios(found)["h.0.dt_proj.weight"] == 1


def test_undecided_roles_are_left_to_fill_in(config, transformers, capsys):
    path = config(**SIGHTED)
    assert main(["table", "--hf", path, "--base-width", "64"]) == 1
    out, complaint = capsys.readouterr()
    assert "experts.gate_up_proj x3" in complaint
    code = out[out.index("groups = ") :]
    with pytest.raises(SyntaxError):
        compile(code, "pasted", "exec")
    assert "(4, 256, 64), (4, 64, 16) at the proxy" in code
    blanks = re.findall(r'"([^"]*)": (<[^>]*>)', code)
    patterns = ["layers.*.experts.gate_up_proj", "layers.*.experts.down_proj"]
    fan_in = "<its fan_in at the proxy>"
    assert blanks == [(patterns[0], fan_in), (patterns[1], fan_in), (patterns[0], "<role>"), (patterns[1], "<role>")]
    for blank, value in [(fan_in, "64"), (fan_in, "16"), ("<role>", "lwadamw.Matrix(fan_in=-1)")]:
        code = code.replace(blank, value, 1 if blank == fan_in else -1)
    groups = pasted(code, transformers.SightedForConditionalGeneration(transformers.SightedConfig()))
    m = ratios(json_table(capsys, path, "--base-width", "64", *EXPERTS))
    assert {name: one.m for name, one in groups.evidence.items() if one.m is not None} == m


def test_undecided_roles_are_null_in_json(config, capsys):
    assert main(["table", "--hf", config(**SIGHTED), "--base-width", "64", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["roles"] == {"layers.*.experts.gate_up_proj": None, "layers.*.experts.down_proj": None}
    assert found["base_width"]["layers.*.experts.down_proj"] is None
    assert found["base_width"]["*"] == 64


def test_a_config_is_found_as_a_file_as_a_folder_and_in_the_cache(config, transformers, tmp_path, capsys):
    path = config(**PLAIN)
    transformers.CACHED["someone/plain"] = str(tmp_path)
    tables = [json_table(capsys, source, "--base-width", "48") for source in (path, str(tmp_path), "someone/plain")]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "plain"}, "PlainLMHeadModel"),
        ({"model_type": "sighted"}, "SightedForConditionalGeneration"),
        ({"model_type": "plain", "architectures": ["PlainModel"]}, "PlainModel"),
        ({**PLAIN, "auto_map": {"AutoModel": "modeling_plain.PlainModel"}}, "PlainLMHeadModel"),
    ],
    ids=["causal", "base", "architectures", "auto_map of a known type"],
)
def test_the_class_is_that_of_the_config_or_else_the_causal_or_the_base_model(fields, name, config, capsys):
    roles = EXPERTS if fields["model_type"] == "sighted" else []
    assert (
        json_table(capsys, config(**fields), "--base-width=64", *(["--set=n_head=4"] * (not roles)), *roles)["model"]
        == name
    )
