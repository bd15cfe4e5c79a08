"""A model and its proxy that were built from one config, and what was done to the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..state.names import layer_type

if TYPE_CHECKING:
    from torch import nn

    from ..width.groups import Evidence

# At most this many fields are named in one line of the report, and at most this many layer types in as many lines.
_MOST_NAMED: Final = 40
_MOST_LINES: Final = 20


@dataclass(frozen=True)
class Pair:
    """A model and its proxy, and what was done to the config.

    Attributes:
        model: the model, on the meta device.
        proxy: the model at the base width; `model` itself where no base width was given.
        origin: the library that has the class, and the path of the config.
        width: the width of the model; None where no width was asked for.
        base_width: the width of the proxy.
        changed: old and new value of each field of the config that differs between the model and the proxy.
        stays: fields of the text config that stay at every width.
        unknown: fields that stay because nothing is known about them.
        towers: nested configs that stay as a whole.
        notes: sentences about single decisions.
    """

    model: nn.Module
    proxy: nn.Module
    origin: str
    width: int | None = None
    base_width: int | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    stays: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    towers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    def as_dict(self) -> dict[str, Any]:
        """Return what was done to the config, for JSON."""
        return {
            "model": self.name,
            "width": self.width,
            "proxy_width": self.base_width,
            "changed": {path: list(values) for path, values in self.changed.items()},
            "stays": dict(self.stays),
            "unknown": dict(self.unknown),
            "nested_configs_that_stay": list(self.towers),
            "notes": list(self.notes),
        }

    def report(self) -> str:
        """Return the lines above the table: which sizes of the proxy differ, and which stay."""
        lines = [f"{self.name} of {self.origin}"]
        if self.width is not None and self.base_width is not None and self.proxy is not self.model:
            lines.append(f"The proxy has the width {self.base_width} instead of {self.width}. Fields of its config:")
            lines += [f"  {path}  {old} -> {new}" for path, (old, new) in self.changed.items()]
            if self.stays:
                lines.append(f"These sizes stay: {_listed(self.stays)}.")
            if self.towers:
                lines.append(f"These nested configs stay as they are: {', '.join(self.towers)}.")
            lines += [note if note.endswith(".") else f"{note}." for note in self.notes]
            if self.unknown:
                path, value = next(iter(self.unknown.items()))
                example = value * self.base_width // self.width if isinstance(value, int) else value
                lines.append(
                    f"These sizes stay because this command does not know them: {_listed(self.unknown)}. If one of them "
                    f"follows the width, give its value at the proxy, like --set {path}={example!r}."
                )
        return "\n".join(lines)

    def unlike(self, evidence: Mapping[str, Evidence]) -> str:
        """Return the layer types whose width ratio is not the ratio of the widths; an empty text if there are none.

        Args:
            evidence: what `param_groups` decided with the proxy as base_width.
        """
        if self.width is None or self.base_width is None:
            return ""
        ratio = self.width / self.base_width
        lines = list(
            dict.fromkeys(
                f"  {one.m:.4g}  {layer_type(name)}"
                for name, one in evidence.items()
                if one.m is not None and one.m != ratio
            )
        )
        if not lines:
            return ""
        more = [f"  and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        return "\n".join(
            [
                f"Their m is not {ratio:.4g}, the ratio of the widths. If one of them should have it, some field of the config "
                "follows the width, and is not among the fields above. Give it with --set.",
                *lines[:_MOST_LINES],
                *more,
            ]
        )


def _listed(values: Mapping[str, Any]) -> str:
    shown = [f"{path} {value}" for path, value in values.items()]
    more = [f"and {len(shown) - _MOST_NAMED} more"] if len(shown) > _MOST_NAMED else []
    return ", ".join([*shown[:_MOST_NAMED], *more])
