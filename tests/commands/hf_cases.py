"""Configs of the stand-in for transformers, and what tests do with the output of `table --hf`."""

import json

import pytest

import lwadamw
from lwadamw.commands import main

EXPERTS = ["--role", "*.gate_up_proj=matrix:-1", "--role", "*.experts.down_proj=matrix:-1"]
SIGHTED = {"model_type": "sighted", "architectures": ["SightedForConditionalGeneration"]}
PLAIN = {"model_type": "plain", "architectures": ["PlainLMHeadModel"]}


def text_table(capsys, *arguments):
    assert main(["table", "--hf", *arguments]) == 0
    return capsys.readouterr().out


def json_table(capsys, *arguments):
    return json.loads(text_table(capsys, *arguments, "--json"))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["table", "--hf", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def pasted(code, model):
    names = {"model": model, "lwadamw": lwadamw}
    exec(code, names)
    return names["groups"]


def ratios(table):
    return {row["name"]: row["m"] for row in table["parameters"] if row["m"] is not None}
