"""The coordinate check on models of transformers, as docs/transfer.md has it."""

import pytest

from lwadamw.commands import main

pytestmark = pytest.mark.engines
transformers = pytest.importorskip("transformers")

HERE = "tests.engines.huggingface.test_check"
CHECK = ["--widths", "64", "256", "--lr", "1e-3", "--seeds", "1"]


def llama(width, follow=True):
    """A LLaMA. Its initial weights follow the width, or not, as in transformers."""
    std = 0.02 * (64 / width) ** 0.5 if follow else 0.02
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 16, "head_dim": 16}
    config = transformers.LlamaConfig(
        vocab_size=256, num_hidden_layers=2, num_key_value_heads=width // 32, initializer_range=std, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(width):
    """A GPT-2, whose head is tied to the embedding."""
    std = 0.02 * (64 / width) ** 0.5
    sizes = {"n_embd": width, "n_head": width // 16, "n_layer": 2, "n_positions": 64}
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=std, **sizes, **tokens))


def test_a_llama_is_flat_under_the_rule_if_its_initial_weights_follow_the_width(capsys):
    assert main(["check", f"{HERE}:llama", *CHECK]) == 0
    assert capsys.readouterr().out.startswith("flat: ")
    assert main(["check", f"{HERE}:llama", *CHECK, "--rule", "standard"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "the change of lm_head grows" in first
    assert "before the first step" not in second
    assert main(["check", f"{HERE}:llama", *CHECK, "--args", "follow=False"]) == 1
    _, second, *_ = capsys.readouterr().out.splitlines()
    assert "before the first step, outputs grow already: model.layers.*.self_attn.q_proj as width^+0.5" in second


def test_a_gpt2_is_flat_but_for_its_tied_head(capsys):
    main(["check", f"{HERE}:gpt2", *CHECK])
    lines = capsys.readouterr().out.splitlines()
    matrices = [line.split() for line in lines if line.startswith("matrix")]
    assert len(matrices) == 8
    assert {words[-1] for words in matrices} == {"flat"}
    (change,) = (line.split() for line in lines if line.startswith("vector  lm_head") and " change " in line)
    assert float(change[-2]) > 0.25
