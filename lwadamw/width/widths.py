"""Which width is the model's: from configs, else from the embedding. Several plausible widths are an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import nn

from .sites import Site, paths, unwrapped

# Attributes of a model that may hold its config, and fields of a config that hold the width.
_CONFIGS: Final = ("config", "cfg", "model_args", "args", "params", "hparams")
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "dim", "width", "embed_dim", "model_dim")


def model_width(model: nn.Module) -> tuple[int, str]:
    """Return the width of a model: of its config, the text config where there is one, else of its embedding.

    Args:
        model: the model.

    Returns:
        The width, and where it was found.

    Raises:
        ValueError: no width is found, or several are plausible.
    """
    model = unwrapped(model)
    found = dict(_of_config(model)) or {
        name: value for name in (*_WIDTHS, "inner_dim") if (value := _whole(getattr(model, name, None))) is not None
    }
    if not found:
        found = {
            f"the embedding {path!r}": module.embedding_dim
            for path, module in paths(model, remove_duplicate=True)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
    if len(set(found.values())) == 1:
        name, width = next(iter(found.items()))
        return width, name
    if not found:
        raise ValueError(
            "param_groups: cannot tell the model's width. Pass width=..., or the proxy model as base_width."
        )
    candidates = ", ".join(f"{value} of {name}" for name, value in found.items())
    raise ValueError(
        f"param_groups: cannot tell the model's width: there are {candidates}. Pass width={max(found.values())} or the width "
        "that is meant, or the proxy model as base_width."
    )


def width_at(site: Site, cache: dict[int, int | None]) -> int | None:
    """Return the width that the innermost config around a parameter gives; None where no module below the model has one.

    In a model of several parts, such as a vision tower and a language model, each part has a config of its own.

    Args:
        site: where the parameter sits.
        cache: what was found for modules before, by id.
    """
    for module in reversed(site.trail[1:]):
        if id(module) not in cache:
            values = {value for _, value in _of_config(module)}
            cache[id(module)] = values.pop() if len(values) == 1 else None
        if (width := cache[id(module)]) is not None:
            return width
    return None


def config_values(model: nn.Module, fields: Sequence[str]) -> Iterator[int]:
    """Yield the values of those fields of a model's config that hold a positive whole number.

    Args:
        model: the model.
        fields: names of fields. Of a config with a text config, the text config counts.
    """
    for _, value in _of_config(unwrapped(model), fields):
        yield value


def _of_config(module: nn.Module, fields: Sequence[str] = _WIDTHS) -> Iterator[tuple[str, int]]:
    """Yield the name and the value of every field of a module's config that has one of the given names."""
    for holder in _CONFIGS:
        config = getattr(module, holder, None)
        if config is None or isinstance(config, nn.Module):
            continue
        text = _field(config, "text_config")
        config, where = (text, f"{holder}.text_config") if text is not None else (config, holder)
        for name in fields:
            if (value := _whole(_field(config, name))) is not None:
                yield f"{where}.{name}", value


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
