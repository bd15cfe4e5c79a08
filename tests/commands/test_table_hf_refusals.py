"""`table --hf` refuses what it cannot build, names the field, and gives a remedy. It never uses the network."""

import os
import sys

import pytest

from lwadamw.commands import main
from tests.commands.hf_cases import PLAIN, SIGHTED, refusal, text_table


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        (
            {"model_type": "new", "auto_map": {"AutoConfig": "configuration_new.NewConfig"}},
            [],
            "model type 'new' needs code from",
        ),
        ({"model_type": "new"}, [], "Update transformers, or correct 'model_type'"),
        ({"hidden_size": 8}, [], "has no field 'model_type'"),
        (
            {**PLAIN, "architectures": ["PlaneModel"]},
            [],
            "names 'PlaneModel', which transformers 5.0.standin does not have",
        ),
        ({"model_type": "two_texts"}, [], "names no class in 'architectures'"),
        ({**PLAIN, "model_type": "two_texts"}, ["--base-width=48"], "Multiple valid text configs were found"),
        ({**PLAIN, "model_type": "widthless"}, ["--base-width=48"], "its nested configs are patcher_config"),
        ({**PLAIN, "model_type": "stubborn"}, ["--base-width=48"], "StubbornConfig sets d_inner to 100 by itself"),
        (
            PLAIN,
            ["--base-width=48", "--set=n_head=5"],
            "PlainLMHeadModel cannot be built on the meta device as the proxy: ValueError: n_embd 48 is not a multiple of "
            "n_head 5. Fields that differ from the model: n_embd 192 -> 48, n_head 12 -> 5, time_step_rank 12 -> 3.",
        ),
        (
            {**PLAIN, "n_head": 7},
            [],
            "as the model: ValueError: n_embd 192 is not a multiple of n_head 7. Correct the config",
        ),
        (
            SIGHTED,
            ["--base-width=64", "--set=text_config.num_key_value_heads=3"],
            "SightedConfig refuses the fields text_config.hidden_size 256 -> 64",
        ),
        (PLAIN, ["--base-width=48", "--set=n_embd=32"], "n_embd is the width itself. Give it with --base-width"),
        (PLAIN, ["--base-width=48", "--set=n_heads=3"], "the config has no field 'n_heads'. Closest: 'n_head'"),
        (SIGHTED, ["--base-width=64", "--set=head_dim=3"], "no field 'head_dim'. Closest: 'text_config.head_dim'"),
        (PLAIN, ["--base-width=48", "--set=n_head=three"], "'n_head=three' is not field=value with a Python literal"),
        (PLAIN, ["--base-width=48", "--set=n_head"], "'n_head' is not field=value"),
        (PLAIN, ["--base-width", "*=48"], "with --hf it is one number"),
        (PLAIN, ["--base-width", "48", "64"], "with --hf it is one number"),
        (PLAIN, ["--base-width=0"], "'0' is not a positive whole number"),
        (PLAIN, ["--depth=1"], "so they need --base-width N"),
        (PLAIN, ["--set=n_head=3"], "so they need --base-width N"),
        (PLAIN, ["--args", "d=4"], "with --hf the config says it all"),
        (PLAIN, ["--base", "models:proxy"], "with --hf the config says it all"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_remedy(fields, arguments, message, config, capsys):
    assert message in refusal(capsys, config(**fields), *arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/other", "with `hf download someone/other config.json`"),
        ("folder", "the folder 'folder' has no config.json"),
        ("text.json", "'text.json' is not JSON"),
    ],
)
def test_a_config_that_is_not_on_disk_is_refused(source, message, transformers, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.json").write_text("hidden_size: 8")
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, source)


def test_without_transformers_the_error_says_how_to_install_it(config, monkeypatch, capsys):
    path = config(**PLAIN)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        assert "`pip install transformers`" in refusal(capsys, path)


def test_the_model_comes_from_a_factory_or_from_a_config(config, capsys):
    for arguments in (["table"], ["table", "models:build", "--hf", config(**PLAIN)]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "give either module:factory or --hf CONFIG" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["table", "models:build", "--depth", "2"])
    assert "they need --hf CONFIG" in capsys.readouterr().err


def test_nothing_is_left_in_the_environment(config, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    text_table(capsys, config(**PLAIN), "--base-width", "48")
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "TRANSFORMERS_OFFLINE" not in os.environ
