"""The summary shows effective values, tau and the evidence, with one line for layers that have equal values."""

from types import SimpleNamespace

import torch
from torch import nn

from lwadamw import AdamW, Matrix, param_groups, summary
from tests import zoo


def test_summary_of_a_scaled_model():
    optimizer = AdamW(param_groups(zoo.Llama(64, 3), 16), lr=1e-2, weight_decay=0.1)
    assert summary(optimizer, steps=1000).splitlines() == [
        "rule fan2025   base lr 0.01   base weight_decay 0.1   tau in steps",
        "parameter                          shape     role    fan_in  m      lr   wd           tau  why",
        "embed_tokens.weight                (96,64)   vector       -  -    0.01    0             -  Embedding",
        "layers.*.attention_norm.weight x3  (64)      vector       -  -    0.01    0             -  RMSNorm",
        "layers.*.ffn_norm.weight x3        (64)      vector       -  -    0.01    0             -  RMSNorm",
        "layers.*.q_norm.weight x3          (8)       vector       -  -    0.01    0             -  RMSNorm",
        "layers.*.k_norm.weight x3          (8)       vector       -  -    0.01    0             -  RMSNorm",
        "norm.weight                        (64)      vector       -  -    0.01    0             -  RMSNorm",
        "layers.*.wq.weight x3              (64,64)   matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.wk.weight x3              (16,64)   matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.wv.weight x3              (16,64)   matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.wo.weight x3              (64,64)   matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.gate_proj.weight x3       (192,64)  matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.up_proj.weight x3         (192,64)  matrix      64  4  0.0025  0.2  2000 = 2 run  Linear",
        "layers.*.down_proj.weight x3       (64,192)  matrix     192  4  0.0025  0.2  2000 = 2 run  Linear, base fan_in 48",
        "lm_head.weight                     (96,64)   output      64  4  0.0025    0             -  head: named 'lm_head'",
        "matrix 21 tensors 141K   output 1 tensors 6.14K   vector 14 tensors 6.64K",
        "the rule assumes of the forward pass: logits of lm_head.weight as they are; attention scores divided by the size of a "
        "head, and not by its root, if this size follows the width",
    ]


def test_the_summary_says_what_the_rule_assumes_of_the_logits():
    def last(model, *args, **kwargs):
        return summary(param_groups(model, 16, *args, **kwargs)).splitlines()[-1]

    assert "logits of lm_head.weight divided by m;" in last(zoo.Llama(64, 1), output="vector")
    assert "logits of wte.weight divided by m;" in last(zoo.GPT2(64)), "a tied head has the constant lr of an embedding"
    assert "the rule assumes" not in last(zoo.Llama(64, 1), "standard")
    assert "logits" not in last(zoo.MoE(64), width=64, roles={"experts.*": Matrix(fan_in=-1)}), (
        "a router gives no logits"
    )


def test_layers_with_other_values_get_their_own_lines():
    model = zoo.Llama(64, 3)
    optimizer = AdamW(param_groups(model, 16, overrides={"layers.1.wq.weight": {"lr": 1e-4}}), lr=1e-2)
    lines = summary(optimizer).splitlines()
    assert any(line.startswith("layers.*.wq.weight x2") for line in lines)
    assert any(line.startswith("layers.1.wq.weight ") for line in lines)
    assert sum(line.startswith("layers.") for line in summary(optimizer, full=True).splitlines()) == 33


def test_summary_follows_a_schedule():
    optimizer = AdamW(param_groups(zoo.Llama(64, 1), 16), lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 4e-3
    assert any("wq.weight" in line and " 0.001 " in line for line in summary(optimizer).splitlines())


def test_summary_of_any_optimizer_and_of_bare_groups():
    model = torch.nn.Linear(4, 4)
    assert "(4,4)" in summary(torch.optim.SGD(model.parameters(), lr=0.1))
    lines = summary(param_groups(model, 1, width=4)).splitlines()
    assert "base lr not set" in lines[0]
    assert lines[2].split()[:7] == ["weight", "(4,4)", "matrix", "4", "4", "0.25", "2"]


def test_the_summary_of_an_optimizer_that_ignores_width_multipliers_says_so():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    groups = param_groups(model, 16)
    line = summary(torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1))
    assert "AdamW does not read the width multipliers of these groups, so the rule has no effect" in line
    assert all("0.01" in row and "0.0025" not in row for row in line.splitlines() if "weight" in row.split(" ")[0])
    ours = AdamW(param_groups(model, 16), lr=0.01)
    assert "does not read" not in summary(ours)
    assert "0.0025" in summary(ours)
    assert "does not read" not in summary(SimpleNamespace(param_groups=ours.param_groups, optim=ours))
    assert "does not read" not in summary(
        torch.optim.AdamW(param_groups(model, 16, fold=True, lr=0.01, weight_decay=0.1))
    )


def test_the_summary_says_when_a_scheduler_has_multiplied_by_the_width():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    optimizer = AdamW(param_groups(model, 16), lr=0.01)
    assert "multiplies twice" not in summary(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.008 * group["width_lr_mult"]
    assert "so the step multiplies twice" in summary(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert "multiplies twice" not in summary(optimizer)
