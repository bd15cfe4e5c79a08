"""torchtitan's own Trainer on a CPU: a device without memory, data without files, and attention that has a backward there."""

from __future__ import annotations

import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

with socket.socket() as _socket:
    _socket.bind(("127.0.0.1", 0))
    _port = str(_socket.getsockname()[1])
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_port)


def _stand_in(name: str, **names: Any) -> None:
    """Put a module in the place of a package that is large and not used here."""
    module: Any = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module


_stand_in("datasets", Dataset=object, load_dataset=None)
_stand_in("datasets.distributed", split_dataset_by_node=None)
_stand_in("torch.utils.tensorboard", SummaryWriter=object)

import torchtitan.tools.utils as utils  # noqa: E402


class _Device(types.ModuleType):
    """torch.cpu, with what torchtitan asks torch.cuda about memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


_device: Any = _Device("device")
_device.__dict__.update(
    set_device=lambda device: None,
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_device_name=lambda device: "cpu",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=2**30),
    memory_stats=lambda device: {},
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
)
utils.device_type, utils.device_module = "cpu", _device
if not hasattr(dist, "set_timeout"):  # torchtitan 0.3 calls a function that torch 2.13 lacks
    dist.__dict__["set_timeout"] = lambda timeout, group: None

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402

VOCABULARY, LENGTH, BATCH = 64, 32, 4


class Tokenizer(BaseTokenizer):
    """A tokenizer that nobody asks anything."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and the tokens that follow, int64[BATCH, LENGTH] each."""
    x = (torch.arange(LENGTH + 1) * (step % 7 + 1) + 5 * torch.arange(BATCH)[:, None]) % VOCABULARY
    return x[:, :-1].contiguous(), torch.arange(LENGTH).repeat(BATCH, 1), x[:, 1:].contiguous()


class Data(BaseDataLoader):
    """Batches by their number, and a place that a checkpoint keeps."""

    # Called with the number of each batch before it is handed out.
    watch: Callable[[int], None] = staticmethod(lambda step: None)

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Any = None, **_: Any) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.watch(self.place)
            x, positions, y = batch(self.place)
            self.place += 1
            yield {"input": x, "positions": positions}, y

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place = state_dict["place"]


def small(config: Any, folder: str, steps: int, interval: int | None = None) -> Any:
    """Make a config of torchtitan's Llama one that a CPU runs: one layer, few tokens, float32, no compiler."""
    model = config.model_spec.model
    model.layers = model.layers[:1]
    model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    model.vocab_size = model.tok_embeddings.num_embeddings = model.lm_head.out_features = VOCABULARY
    config.loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    config.dataloader, config.tokenizer = Data.Config(), Tokenizer.Config()
    config.training.local_batch_size, config.training.seq_len = BATCH, LENGTH
    config.training.steps, config.training.disable_cuda_graphs = steps, True
    config.training.mixed_precision_param = "float32"
    config.checkpoint = CheckpointManager.Config(
        enable=interval is not None, interval=interval or steps, last_save_model_only=False
    )
    config.debug.seed, config.dump_folder = 0, folder
    config.metrics.log_freq, config.validator.enable = 1, False
    return config
