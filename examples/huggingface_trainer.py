"""transformers.Trainer with a width rule, and norms in its logs."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lwadamw.engines import huggingface


class WidthTrainer(huggingface.WidthTrainer, Trainer):
    width = {"base_width": 16}  # the arguments of lwadamw.param_groups


config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
data = [{"input_ids": (row := torch.arange(16) * (i % 7 + 1) % 64), "labels": row} for i in range(160)]

with tempfile.TemporaryDirectory() as folder:
    trainer = WidthTrainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(folder, max_steps=20, learning_rate=1e-2, weight_decay=0.1, report_to=[], use_cpu=True),
        train_dataset=data,
        callbacks=[huggingface.callback(every=10, prefix="norms/")],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "norms/role/matrix/weight_rms" in entry]
    print([(entry["step"], round(entry["norms/role/matrix/weight_rms"], 4)) for entry in logged])
