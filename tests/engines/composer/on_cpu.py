"""Composer, imported next to a torch without CUDA: it imports torchvision, whose operators a run does not use."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.architectures.packages import declare_torchvision_operators

# `make test-frameworks` installs Composer here, away from the other frameworks.
sys.path.append(str(Path(sys.prefix, "composer")))
declare_torchvision_operators()
composer = importlib.import_module("composer")
for _part in ("algorithms", "callbacks", "loggers"):
    importlib.import_module(f"composer.{_part}")
