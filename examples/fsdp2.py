"""FSDP2 with a width rule: clipping and norms of the whole model, and a distributed checkpoint.

python examples/fsdp2.py                            one process, on the CPU if there is no GPU
torchrun --nproc-per-node 2 examples/fsdp2.py       two processes, a GPU each if there are any
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lwadamw

device = "cuda" if torch.cuda.is_available() else "cpu"


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).to(
        device
    )
    fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))
    # Width ratios are those of the whole parameters.
    groups = lwadamw.param_groups(model, {"1.weight": 16, "3.weight": 64}, roles={"3.weight": "output"})
    return model, lwadamw.AdamW(groups, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randint(0, 64, (16,), generator=generator).to(device)
        loss = nn.functional.cross_entropy(model(x), (3 * x + 1) % 64)
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            norms = optimizer.norms()  # of the whole model; every process calls it
            if dist.get_rank() == 0:
                print(
                    step + 1, f"{loss.item():.4f}", dict(zip(norms.names, norms.weight.round(3).tolist(), strict=True))
                )
        optimizer.zero_grad()
    return loss.item()


def main(folder):
    model, optimizer = build()
    train(model, optimizer, range(10))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder)
    straight = train(model, optimizer, range(10, 20))

    model, optimizer = build()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert train(model, optimizer, range(10, 20)) == straight, "the resumed run differs"
    print("the resumed run has the same loss")


if __name__ == "__main__":
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29531")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    main(folders[0])
    dist.barrier()  # Without it, a thread of gloo that still holds a tensor can abort a process on the CPU as it ends.
    dist.destroy_process_group()
