"""What the server of processes.py does once, and its forks need not: import torch, and let Triton read the kernels."""

import pytest  # noqa: F401
import torch
import torch.distributed.optim

from ..interpreter import quicken
from . import models

quicken()
if not torch.cuda.is_available():
    torch.set_num_threads(1)  # a fork does not have the threads of its server
    _p = torch.nn.Parameter(torch.zeros(2, 2))
    _p.grad = torch.zeros(2, 2)
    _optimizer = models.optimizer(torch.nn.ParameterList([_p]), "triton", max_grad_norm=1.0)
    _optimizer.step()
    _optimizer.norms()
