"""A tiny GPT of megatron-core and its optimizer, in each of Megatron's wrappers and parallel layouts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import shim, stand_in

BATCH, LENGTH, VOCABULARY, HIDDEN, HEADS, EXPERTS = 4, 8, 32, 16, 4, 4


@dataclass(frozen=True)
class Case:
    """One way to run Megatron.

    Attributes:
        wrapper: "fp32" (FP32Optimizer), "bf16" (Float16OptimizerWithFloat16Params), "distributed fp32", "distributed bf16", or
            precision-aware: "aware" with float32 master weights, "aware remainder" with remainders and bfloat16 moments.
        tp: number of tensor-parallel processes.
        ep: number of expert-parallel processes; 1 for experts on one process, 0 for a dense model.
        slim: the model has no biases and no position embeddings, so that Triton's interpreter has fewer tensors.
    """

    wrapper: str
    tp: int = 1
    ep: int = 0
    slim: bool = False

    def __str__(self) -> str:
        return f"{self.wrapper}, tp {self.tp}" + (f", ep {self.ep}" if self.ep else "")

    @property
    def layout(self) -> tuple[int, int]:
        """Sizes of tensor and expert parallelism."""
        return self.tp, max(1, self.ep)

    @property
    def sharded(self) -> bool:
        return not self.wrapper.startswith(("fp32", "bf16"))

    @property
    def half(self) -> bool:
        return "fp32" not in self.wrapper

    @property
    def aware(self) -> bool:
        return self.wrapper.startswith("aware")

    @property
    def bound(self) -> float:
        """How far losses may be from those of torch's AdamW in the same engine."""
        return 2e-3 if self.half else 1e-6


@dataclass
class Run:
    """A model with its optimizer and scheduler."""

    model: Any
    optimizer: Any
    scheduler: Any

    def inner(self) -> list[Any]:
        return [o.optimizer for o in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]

    def wrappers(self) -> set[str]:
        return {type(o).__name__ for o in getattr(self.optimizer, "chained_optimizers", [self.optimizer])}


_layout: tuple[int, int] | None = None  # of the process groups that this process has


@contextlib.contextmanager
def layout(case: Case) -> Iterator[None]:
    """Megatron's process groups for a case. They stay for a next case of the same layout, since each of them has threads."""
    global _layout
    shim.install()
    from megatron.core import parallel_state

    if _layout != case.layout:
        _leave_layout()
        tp, ep = _layout = case.layout
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, expert_model_parallel_size=ep)
    yield


def _leave_layout() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()  # which leaves the groups themselves, and their threads
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def optimizer_of(how: str, case: Case, **options: Any) -> Iterator[None]:
    """Let Megatron build one of three optimizers: "torch" (its own choice here), "stand-in", or "ours"."""
    from lwadamw.engines import megatron

    with contextlib.ExitStack() as stack:
        if how == "stand-in" or case.aware:
            stack.enter_context(shim.transformer_engine(stand_in.FusedAdam))
        if how == "ours":
            stack.enter_context(megatron.use(**options))
        yield


def build(
    case: Case,
    *,
    seed: int = 0,
    hidden: int = HIDDEN,
    layers: int = 2,
    overrides: Callable[..., Any] | None = None,
    experts_alike: bool = False,
) -> Run:
    """Build a model and its optimizer. Every process calls it.

    Args:
        case: wrapper and layout.
        seed: of the weights.
        hidden: width.
        layers: number of layers.
        overrides: makes config overrides from the OptimizerConfig and the model chunks.
        experts_alike: a model of one layer has the same weights under every number of expert-parallel processes. Megatron
            draws the same experts on every process.
    """
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if case.half else torch.float32
    options: dict[str, Any] = {"add_bias_linear": False, "normalization": "RMSNorm"} if case.slim else {}
    if case.ep:
        options |= {
            "num_moe_experts": EXPERTS,
            "expert_model_parallel_size": case.ep,
            "moe_token_dispatcher_type": "allgather",
            # In bfloat16 every token goes to all experts. With a choice of two, torch's own losses move by up to 4e-3 where one
            # bit of its float32 weights is changed, because a router turns it into the choice of another expert.
            "moe_router_topk": 4 if case.half else 2,
            "add_bias_linear": False,
        }
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=HEADS,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=case.half,
        tensor_model_parallel_size=case.tp,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        **options,
    )
    spec = (
        get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False) if case.ep else get_gpt_layer_local_spec()
    )
    positions: dict[str, Any] = {"position_embedding_type": "none"} if case.slim else {}
    model: Any = GPTModel(config, spec, VOCABULARY, LENGTH, share_embeddings_and_output_weights=False, **positions)
    if experts_alike and case.ep:
        _draw_experts(model, case)
    if case.half:
        model = Float16Module(config, model)
    # Small buckets, so that shards begin and end inside parameters.
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=case.sharded, bucket_size=2000
    )
    model = DistributedDataParallel(config, ddp, model)
    aware: dict[str, Any] = {}
    if case.aware:
        moments = torch.bfloat16 if "remainder" in case.wrapper else torch.float32
        aware = {
            "use_precision_aware_optimizer": True,
            "store_param_remainders": "remainder" in case.wrapper,
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
        }
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=case.half,
        params_dtype=dtype,
        use_distributed_optimizer=case.sharded,
        clip_grad=1.0,
        **aware,
    )
    given = {} if overrides is None else {"config_overrides": overrides(settings, [model])}
    optimizer = get_megatron_optimizer(settings, [model], **given)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=2,
        lr_decay_steps=30,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=30,
        wd_incr_style="constant",
    )
    return Run(model, optimizer, scheduler)


def expert_index(name: str, case: Case, rank: int) -> int | None:
    """Return the number of an expert among all experts from the name of its parameter. None: it is no expert's.

    Args:
        name: of a parameter of the model of one process.
        case: the layout.
        rank: of the process in the expert-parallel group.
    """
    _, found, after = name.partition(".local_experts.")
    return rank * EXPERTS // case.ep + int(after.split(".")[0]) if found else None


@torch.no_grad()
def _draw_experts(model: Any, case: Case) -> None:
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    for name, p in model.named_parameters():
        # Megatron draws the output layer after the experts of this process, so its weights depend on their number.
        index = EXPERTS if name == "output_layer.weight" else expert_index(name, case, rank)
        if index is not None:
            generator = torch.Generator().manual_seed(2 * index + name.endswith("linear_fc1.weight"))
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def step(run: Run, index: int) -> float:
    """Take one step on the batch of this index. Return the loss over the whole batch, the same on every process."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 + index))
    tokens = tokens.chunk(size)[rank]
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    loss = run.model(tokens, positions, mask, labels=tokens).float().mean()
    loss.backward()
    finalize_model_grads([run.model])
    run.optimizer.step()
    run.scheduler.step(1)
    total = loss.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() / size


def train(run: Run, steps: range) -> list[float]:
    """Take steps. Return their losses."""
    return [step(run, index) for index in steps]
