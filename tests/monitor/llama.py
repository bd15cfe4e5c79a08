"""The runs of a Hugging Face LLaMA that tests/fixtures/write_llama.py made: their profiles and their readings."""

from dataclasses import replace

import numpy as np

from lwadamw.monitor import profile_file
from lwadamw.monitor.profile import Profile
from lwadamw.monitor.reading import Reading
from tests.fixtures.write_llama import FOLDER


def path(name):
    """Return the path of a profile as text."""
    return str(FOLDER / f"{name}.json")


def readings(name):
    """Return the readings of a run, oldest first."""
    with np.load(FOLDER / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    columns = {key.partition("/")[2]: data[key].astype(float) for key in data if key.startswith("columns/")}
    return [
        Reading(
            int(step),
            tuple(data["names"].tolist()),
            tuple(data["roles"].tolist()),
            *(data[key][i].astype(float) for key in ("m", "lr", "weight_decay")),
            {key: column[i] for key, column in columns.items()},
            fan_in=data["fan_in"][i].astype(float),
            rule=str(data["rule"]),
        )
        for i, step in enumerate(data["step"])
    ]


def profile(name):
    """Return the profile of a run with the history that `Monitor.save` writes."""
    seen = readings(name)
    history = tuple(Profile.of(seen[: i + 1]).by_type() for i in range(len(seen)))
    return replace(profile_file.load(path(name)), history=history)
