"""Profiles and readings that are made up, for the tests of profiles, comparison and drift."""

import math

import numpy as np

from lwadamw.monitor import profile_file
from lwadamw.monitor.profile import Profile, SegmentProfile

LR, WD, BASE = 3e-3, 0.5, 64


def made(rule, m, depth=2, taus=5.0, factors=None, noise=0.02, seed=0, width=None):
    """Make a profile that follows a rule and the laws, with random noise of relative size `noise`.

    Each value is multiplied by `factors[kind, statistic]`, if there is one. `width` is the true width over that of the proxy.
    If it is not given it is m, the width ratio that the rule uses.
    """
    generator = np.random.default_rng(seed)
    scale = rule.matrix.at(m)
    width = m if width is None else width
    lr, wd = LR * scale.lr, WD * scale.wd
    segments = []
    for i in range(depth):
        for kind, rows, columns in (("attention.qkv", 3, 1), ("ffn.down", 1, 3)):
            d, k = round(columns * BASE * width), round(rows * BASE * width)
            values = {
                "weight_rms": math.sqrt(lr / wd),
                "relative_update": math.sqrt(lr * wd),
                "rotation": math.sqrt(lr * wd),
                "top": math.sqrt(lr / wd) * d**0.75,
                "bulk": math.sqrt(lr / wd) * (math.sqrt(k) + math.sqrt(d)),
                "gain": 0.3 * math.sqrt(lr / wd) * d**0.75,
                "representation_change": 1.2 * math.sqrt(lr * wd),
                "alignment_ratio": 1.2,
            }
            name = f"layers.{i}.{kind}.weight"
            for key in values:
                values[key] *= (1 + noise * generator.standard_normal()) * (factors or {}).get((kind, key), 1.0)
            segments.append(SegmentProfile(name, "matrix", m, lr, wd, taus, (k, d), d, values))
    segments.append(
        SegmentProfile("norm.weight", "vector", math.nan, LR, 0.0, math.nan, (64,), None, {"weight_rms": 1.0})
    )
    return Profile(tuple(segments), 1000, rule.name, {"lr": LR, "weight_decay": WD}, (910, 1000), {"batch": 8}, "0.1.0")


def written(path, given):
    """Write a profile to a file and return the path as text."""
    profile_file.write(path, given)
    return str(path)
