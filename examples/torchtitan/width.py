"""torchtitan's Llama with a width rule: a config like those of torchtitan, with another optimizer.

    torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan.width --config llama3_width

The learning rate and the weight decay are those that were tuned at width 64. The model has width 256. The config
`llama3_width_watched` also logs norms every 100 steps, and keeps the monitor in the checkpoints.
"""

from torchtitan.models.llama3.config_registry import llama3_debugmodel

from lwadamw.engines import torchtitan


def llama3_width():
    config = llama3_debugmodel()
    config.optimizer = torchtitan.config(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), base_width=64, rule="fan2025")
    return config


def llama3_width_watched():
    return torchtitan.watched(llama3_width(), every=100)
