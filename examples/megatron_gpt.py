"""Train a tiny GPT with megatron-core, AdamW of lwadamw, width multipliers and norms.

    torchrun --nproc-per-node 2 examples/megatron_gpt.py --tensor-parallel 2 --hidden 256 --base-width 64

megatron-core 0.16 or later has to be installed. Every process takes one GPU. The texts are random tokens, each followed by the
token that a fixed table names for it, so the loss falls from log(64) = 4.2 towards 0. Norms go to a TensorBoard writer if
--tensorboard-dir names a folder, and to the terminal otherwise.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from lwadamw.engines import megatron

VOCABULARY, LENGTH = 64, 32


class Terminal:
    """What Megatron logs to: the one method of a TensorBoard writer that its training loop calls."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Print one value."""
        print(f"{step:5d}  {name} {value:.4g}", flush=True)


def build_model(hidden: int, layers: int) -> Any:
    """A GPT in bfloat16 inside Megatron's wrappers. Its gradients are reduced for DistributedOptimizer."""
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 16,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, share_embeddings_and_output_weights=False
    ).to(torch.cuda.current_device())
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(config, ddp, Float16Module(config, model))


def build_optimizer(model: Any, base_width: int, steps: int) -> tuple[Any, Any, Any]:
    """The optimizer, its scheduler, and the watch that reads norms."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    # docs: begin
    megatron.use()  # once, before the optimizer is built
    overrides = megatron.config_overrides(config, [model], base_width=base_width, rule="fan2025")
    optimizer = get_megatron_optimizer(config, [model], config_overrides=overrides)
    watch = megatron.attach(optimizer, [model])  # norms by the model's names
    # docs: end
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(1, steps // 10),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler, watch


def batch_of(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the tokens that follow them, int64[size, LENGTH] each. Tensor-parallel processes get the same ones."""
    follower = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step * 1024 + parallel_state.get_data_parallel_rank())
    tokens = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    device = torch.cuda.current_device()
    return tokens.to(device), follower[tokens].to(device)


def train(arguments: argparse.Namespace, writer: Any) -> list[float]:
    """Train, and write norms. Return the loss of each step, the mean over data-parallel processes."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    model = build_model(arguments.hidden, arguments.layers)
    optimizer, scheduler, watch = build_optimizer(model, arguments.base_width, arguments.steps)
    positions = torch.arange(LENGTH, device=torch.cuda.current_device()).expand(arguments.batch, -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=torch.cuda.current_device()).triu(1)
    losses = []
    for step in range(arguments.steps):
        tokens, labels = batch_of(step, arguments.batch)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, mask, labels=labels).float().mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        # docs: norms begin
        if step % arguments.log_interval == 0:
            norms = watch.norms()  # all processes call it, before the gradients are cleared
            for name, value in norms.as_dict("norm/").items() if writer is not None else ():
                writer.add_scalar(name, value, step)
        # docs: norms end
        scheduler.step(1)
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM, group=parallel_state.get_data_parallel_group())
        losses.append(mean.item() / parallel_state.get_data_parallel_world_size())
        if writer is not None and step % arguments.log_interval == 0:
            writer.add_scalar("lm loss", losses[-1], step)
    return losses


def main(given: Sequence[str] | None = None, writer: Any = None) -> list[float]:
    """Read the command line, train, and return the losses.

    Args:
        given: the command line; None: that of this process.
        writer: where the last process writes to; None: what the command line says.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 16")
    parser.add_argument("--base-width", type=int, default=64, help="width at which the learning rate was tuned")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences per data-parallel process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log-interval", type=int, default=10)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--tensorboard-dir")
    arguments = parser.parse_args(given)
    if not dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl")
    if writer is None and dist.get_rank() == dist.get_world_size() - 1:  # as in Megatron
        writer = Terminal()
        if arguments.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(arguments.tensorboard_dir)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=arguments.tensor_parallel)
    try:
        return train(arguments, writer)
    finally:
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
