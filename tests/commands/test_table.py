"""`table` shows the roles of a model that is never allocated, and refuses a model that it cannot build or decide."""

import inspect
import json
import re
import sys

import pytest

import lwadamw
from lwadamw import param_groups
from lwadamw.commands import main
from tests import zoo

FAILING = """
import some_module_that_is_not_there_either
"""
FACTORIES = """

def llama(): return Llama(64, 3)
def proxy(): return Llama(16, 1)
def reads(): return nn.Linear(int(torch.ones(3).sum()), 4)
def moves(): return nn.Linear(3, 4).to("cpu")
def nothing(): pass
def frozen():
    model = Mamba(64)
    model.mixture.requires_grad_(False)
    return model
built = nn.Linear(2, 2)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Makes a current folder with two modules: one with the zoo and difficult factories, one that cannot be imported."""
    (tmp_path / "models_of_mine.py").write_text(inspect.getsource(zoo) + FACTORIES)
    (tmp_path / "failing_models.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "models_of_mine"
    for name in ("models_of_mine", "failing_models"):
        sys.modules.pop(name, None)


CASES = {
    "int": (["Llama", "--args", "d=64", "layers=3", "--base-width", "16"], zoo.Llama, (64, 3), 16, {}),
    "proxy": (["llama", "--base", "models_of_mine:proxy"], zoo.Llama, (64, 3), zoo.Llama(16, 1), {}),
    "pattern": (["GPT2", "--args", "d=64", "--base-width", "re:(?=.*c_proj)=32", "*=8"], zoo.GPT2, (64,), None, {}),
    "rule": (
        ["GPT2", "--args", "d=64", "--base-width", "8", "--rule", "balanced"],
        zoo.GPT2,
        (64,),
        8,
        {"rule": "balanced"},
    ),
    "output": (["llama", "--base-width", "16", "--output", "vector"], zoo.Llama, (64, 3), 16, {"output": "vector"}),
    "roles": (
        [
            "ViT",
            "--args",
            "d=64",
            "--base-width",
            "16",
            "--width=64",
            "--role=mixing=vector",
            "--role=re:^(?=pos)=vector",
        ],
        zoo.ViT,
        (64,),
        16,
        {"width": 64, "roles": {"mixing": "vector", "re:^(?=pos)": "vector"}},
    ),
    "fan_in": (
        ["MoE", "--args", "d=64", "--base-width", "16", "--width", "64", "--role", "experts.*=matrix:-1"],
        zoo.MoE,
        (64,),
        16,
        {"width": 64, "roles": {"experts.*": lwadamw.Matrix(fan_in=-1)}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_table_prints_the_summary_of_the_built_model(case, models, capsys):
    (factory, *arguments), build, sizes, base, options = CASES[case]
    groups = param_groups(build(*sizes), {"re:(?=.*c_proj)": 32, "*": 8} if base is None else base, **options)
    assert main(["table", f"{models}:{factory}", *arguments]) == 0
    assert capsys.readouterr().out == lwadamw.summary(groups) + "\n"
    optimizer = lwadamw.AdamW(groups, lr=3e-3, weight_decay=0.2)
    assert (
        main(["table", f"{models}:{factory}", *arguments, "--lr", "3e-3", "--wd", "0.2", "--steps", "500", "--full"])
        == 0
    )
    assert capsys.readouterr().out == lwadamw.summary(optimizer, steps=500, full=True) + "\n"


def test_table_allocates_nothing(models, capsys):
    assert main(["table", f"{models}:Llama", "--args", "d=1048576", "layers=1", "--base-width", "1024"]) == 0
    assert "(3145728,1048576)" in capsys.readouterr().out  # 13 TB


def test_table_without_a_proxy_shows_roles_at_m_1(models, capsys):
    assert main(["table", f"{models}:llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["m"] for row in found} == {1.0, None}
    assert {row["lr"] for row in found} == {1.0}


def test_table_as_json_has_a_row_for_every_parameter(models, capsys):
    command = ["table", f"{models}:llama", "--base-width", "16", "--json"]
    assert main([*command, "--lr", "0.01", "--wd", "0.1", "--steps", "1000"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {name for name, _ in zoo.Llama(64, 3).named_parameters()}
    down = found["layers.2.down_proj.weight"]
    assert (down["shape"], down["role"], down["fan_in"], down["m"]) == ([64, 192], "matrix", 192, 4.0)
    assert [down[key] for key in ("lr", "weight_decay", "tau", "tau_of_run")] == pytest.approx([0.0025, 0.2, 2000, 2])
    assert (found["norm.weight"]["tau"], found["norm.weight"]["weight_decay"]) == (None, 0)
    assert main([*command[:2], "--base-width", "16", "--json"]) == 0
    assert "tau_of_run" not in json.loads(capsys.readouterr().out)[0]


UNDECIDED = {
    "Mamba": ["mixture"],
    "MoE": ["experts.gate_up", "experts.down"],
    "ViT": ["mixing"],
    "LoRALinear": ["lora_A.weight", "lora_B.weight"],
    "Recurrent": ["bilinear.weight"],
}


@pytest.mark.parametrize("model", UNDECIDED)
def test_undecided_parameters_are_all_listed_and_can_be_decided(model, models, capsys):
    command = ["table", f"{models}:{model}", "--args", "d=64"]
    assert main(command) == 1
    out, complaint = capsys.readouterr()
    listed = [line.split()[0] for line in complaint.splitlines() if re.match("  [^ ]", line)]
    assert listed == UNDECIDED[model]
    assert out == ""
    patterns = re.findall(r"--role '(.*?)=<role>'", complaint)
    assert patterns == listed
    decided = [text for pattern in patterns for text in ("--role", f"{pattern}=vector")]
    assert main([*command, *decided]) == 0
    assert "roles['" in capsys.readouterr().out


def test_a_frozen_parameter_needs_no_role(models, capsys):
    assert main(["table", f"{models}:frozen"]) == 0
    assert "frozen 1 (left out)" in capsys.readouterr().out
    assert main(["table", f"{models}:frozen", "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "mixture"]
    assert row["frozen"] is True


def test_undecided_parameters_of_many_layers_share_a_line(models, capsys, tmp_path):
    (tmp_path / "models_of_mine.py").write_text(
        inspect.getsource(zoo) + "\ndef deep(): return nn.ModuleList(Mamba(16) for _ in range(20))\n"
    )
    assert main(["table", f"{models}:deep"]) == 1
    complaint = capsys.readouterr().err
    assert "20 parameter(s)" in complaint
    assert "*.mixture x20  (16, 16)" in complaint
    assert main(["table", f"{models}:deep", "--full"]) == 1
    assert capsys.readouterr().err.count("mixture  (16, 16)") == 20
    assert main(["table", f"{models}:deep", "--role", "*.mixture=vector"]) == 0


LLAMA = ["models_of_mine:Llama", "--args", "d=64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models_of_mine"], "'models_of_mine' is not of the form module:factory"),
        (["no_such_module.models:build"], "no module 'no_such_module'. Give a dotted name"),
        (
            ["failing_models:build"],
            "importing 'failing_models' fails: No module named 'some_module_that_is_not_there_either'",
        ),
        (["models_of_mine:Lama"], "module 'models_of_mine' has no 'Lama'. Closest: 'Llama'"),
        (["models_of_mine:built"], "is a Linear, not a class or function"),
        (["models_of_mine:Llama"], "Llama(d: 'int', layers: 'int' = 2) cannot be called with {}: missing a required"),
        (["models_of_mine:Llama", "--args", "x=1"], "Give them with --args k=v"),
        (["models_of_mine:reads"], "fails on the meta device: RuntimeError: Tensor.item() cannot be called on meta"),
        (["models_of_mine:moves"], "Cannot copy out of meta tensor"),
        (["models_of_mine:nothing"], "returned NoneType, not a torch.nn.Module. Return the model"),
        (["models_of_mine:Llama", "--args", "d"], "--args: 'd' is not name=value with a Python literal"),
        (["models_of_mine:Llama", "--args", "d=wide"], "--args: 'd=wide' is not name=value with a Python literal"),
        (
            [*LLAMA, "--base", "models_of_mine:Llama"],
            "--base: models_of_mine:Llama(d: 'int', layers: 'int' = 2) cannot be",
        ),
        ([*LLAMA, "--base", "models_of_mine:proxy", "--base-width", "16"], "--base-width says the same"),
        ([*LLAMA, "--base-width", "16.0"], "--base-width: '16.0' is not a positive whole number"),
        ([*LLAMA, "--base-width", "16", "*=16"], "--base-width: '16' is not pattern=fan_in"),
        ([*LLAMA, "--base-width", "*.wx.*=16"], "base_width pattern '*.wx.*' matches no parameter"),
        ([*LLAMA, "--base-width", "16", "--width", "48"], "is not a multiple of the width 48"),
        ([*LLAMA, "--role", "*.wq.weight=tensor"], "--role: '*.wq.weight=tensor' is not pattern=role"),
        ([*LLAMA, "--role", "*.wq.weight=vector:1"], "--role: '*.wq.weight=vector:1' is not pattern=role"),
        ([*LLAMA, "--role", "*.wx.weight=vector"], "roles pattern '*.wx.weight' matches no parameter"),
        ([*LLAMA, "--lr", "0.01"], "--lr and --wd go together"),
        ([*LLAMA, "--steps", "100"], "--steps: tau needs --lr and --wd"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_table_refuses_bad_arguments_and_models_that_it_cannot_build(arguments, message, models, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_message_about_a_failing_factory_names_the_line_in_the_users_file(models, capsys, tmp_path):
    line = (
        (tmp_path / "models_of_mine.py")
        .read_text()
        .splitlines()
        .index("def reads(): return nn.Linear(int(torch.ones(3).sum()), 4)")
    )
    with pytest.raises(SystemExit):
        main(["table", f"{models}:reads"])
    assert f"models_of_mine.py:{line + 1})" in capsys.readouterr().err
