"""Build a model of transformers and its proxy from a config that is on disk, on the meta device, at two widths."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import config_width
from .config_width import Scaled, at_width, differences, section_at, width_field
from .pair import Pair

if TYPE_CHECKING:
    from torch import nn

FACTORY: Final = "write a function that builds the model, and give it as module:factory, with --base for the proxy"


def build_pair(
    source: str, width: int | None, base_width: int | None, depth: int | None, settings: Mapping[str, Any]
) -> Pair:
    """Build the model of a config, and its proxy.

    Args:
        source: path of a config.json, a folder that has one, or the id of a model in the cache of transformers.
        width: width of the model; None: as the config says.
        base_width: width of the proxy; None: the model is its own proxy.
        depth: the most layers of the proxy; None: as many as the model has.
        settings: values of single fields at the proxy, by path with dots.

    Raises:
        ValueError: transformers is missing, the config is not on disk or is not one of transformers, its width is not clear,
            a size does not come out whole, or a model cannot be built.
    """
    with _offline():
        transformers = _transformers()
        where = _find(transformers, source)
        config = _load(transformers, where, source)
        make, name = _maker(transformers, config, where)
        origin = f"transformers {transformers.__version__}, {where}"
        if width is None and base_width is None:
            model = _build(make, name, config, "the model", {})
            return Pair(model, model, origin)
        fields: dict[str, Any] = config.to_dict()
        following, width_name = _widths(config, fields, where)
        if width is not None:
            scaled = at_width(fields, following, width_name, width, "--width")
            config = _rebuild(config, fields, scaled, "--width")
            fields = config.to_dict()
        model = _build(make, name, config, "the model", {})
        own = section_at(fields, following[0])[width_name]
        if base_width is None:
            return Pair(model, model, origin, own, own)
        scaled = at_width(fields, following, width_name, base_width, "--base-width", settings, depth)
        base = _rebuild(config, fields, scaled, "--base-width")
        changed = differences(fields, base.to_dict())
        proxy = _build(make, name, base, "the proxy", changed)
        return Pair(
            model=model,
            proxy=proxy,
            origin=origin,
            width=own,
            base_width=base_width,
            changed=changed,
            stays=scaled.stays,
            unknown=scaled.unknown,
            towers=tuple(_towers(config, following)),
            notes=tuple(scaled.notes),
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the libraries of Hugging Face from the network, which some model classes use while they are built."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        if error.name != "transformers":
            raise ValueError(
                f"argument --hf: importing transformers fails: {error}. Install what it misses."
            ) from error
        raise ValueError(
            f"argument --hf: transformers is not installed. Install it with `pip install transformers`, or {FACTORY}."
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _find(transformers: Any, source: str) -> Path:
    """Return the path of the config file."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        raise ValueError(f"argument --hf: the folder {source!r} has no config.json. Give the folder that has one.")
    found = None
    with contextlib.suppress(
        Exception
    ):  # What it raises depends on the version, and always means that there is no file.
        found = transformers.utils.cached_file(source, "config.json", local_files_only=True)
    if found is None:
        raise ValueError(
            f"argument --hf: {source!r} is no file, no folder, and no model whose config.json is in the cache of "
            "transformers. This command downloads nothing. Give the path of a config.json; or download it first, with "
            f"`hf download {source} config.json`."
        )
    return Path(found)


def _load(transformers: Any, where: Path, source: str) -> Any:
    """Return the config object."""
    try:
        given = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"argument --hf: {str(where)!r} is not JSON: {error}. Give the config.json of a model."
        ) from None
    if not (isinstance(given, dict) and "model_type" in given):
        raise ValueError(
            f"argument --hf: {str(where)!r} has no field 'model_type', so transformers cannot tell its class. Add it, like "
            '"model_type": "llama"; or ' + FACTORY + "."
        )
    kind = given["model_type"]
    if "auto_map" in given and kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"argument --hf: model type {kind!r} needs code from {source!r} (its config has 'auto_map'), and this command "
            f"runs no such code. Instead, {FACTORY}."
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(where), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        known = kind in transformers.CONFIG_MAPPING
        remedy = "Correct the config" if known else "Update transformers, or correct 'model_type'"
        raise ValueError(
            f"argument --hf: transformers {transformers.__version__} cannot read {str(where)!r} of model type {kind!r}: "
            f"{_told(error)} {remedy}; or {FACTORY}."
        ) from error


def _maker(transformers: Any, config: Any, where: Path) -> tuple[Callable[[Any], nn.Module], str]:
    """Return the function that builds a model from a config, and the name of the model's class."""
    for name in getattr(config, "architectures", None) or ():
        try:
            found = getattr(transformers, name, None)
        except Exception as error:
            raise ValueError(
                f"argument --hf: importing {name} of transformers fails: {_told(error)} Install what it misses; or {FACTORY}."
            ) from error
        if found is None:
            raise ValueError(
                f"argument --hf: 'architectures' in {str(where)!r} names {name!r}, which transformers "
                f"{transformers.__version__} does not have. Name one of its classes there; or {FACTORY}."
            )
        return found, name
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config, auto.__name__
    raise ValueError(
        f"argument --hf: {str(where)!r} names no class in 'architectures', and transformers has no default class for "
        f"{type(config).__name__}. Name one there; or {FACTORY}."
    )


def _widths(config: Any, fields: Mapping[str, Any], where: Path) -> tuple[list[config_width.Path], str]:
    """Return the paths of the configs that follow the width, the text model's first, and the name of the width in it.

    Vision and audio towers do not follow. An encoder of text does, which has the class of the decoder or a config of text.
    """
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ValueError(
            f"argument --hf: which nested config has the width of {type(config).__name__}? {_told(error)} Instead, {FACTORY}."
        ) from None
    path = _path_of(config, text) or ()
    section = section_at(fields, path)
    found = width_field(section, getattr(type(text), "attribute_map", {}))
    if found is None or not isinstance(section[found], int):
        nested = ", ".join(".".join(path) for path, _ in _nested(config))
        raise ValueError(
            f"argument --hf: {str(where)!r} has no field that is the width of the model, like hidden_size"
            + (f"; its nested configs are {nested}" if nested else "")
            + f". Instead, {FACTORY}."
        )
    encoder = getattr(config, "encoder", None) if path == ("decoder",) else None
    if type(encoder) is type(text):
        return [path, ("encoder",)], found
    if hasattr(encoder, "text_config"):
        return [path, ("encoder", "text_config")], found
    return [path], found


def _nested(config: Any, path: config_width.Path = ()) -> Iterator[tuple[config_width.Path, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield (*path, name), value
            yield from _nested(value, (*path, name))


def _path_of(config: Any, wanted: Any) -> config_width.Path | None:
    return next((path for path, nested in _nested(config) if nested is wanted), None)


def _towers(config: Any, following: Sequence[config_width.Path]) -> Iterator[str]:
    """Yield the paths of the outermost nested configs of which nothing follows the width."""
    found: list[config_width.Path] = []
    for path, _ in _nested(config):
        inside = any(path[: len(other)] == other for other in (*found, *(f for f in following if f)))
        above = any(other[: len(path)] == path for other in following)
        if not inside and not above and path[-1] not in config_width.PARTS:
            found.append(path)
            yield ".".join(path)


def _rebuild(config: Any, before: Mapping[str, Any], scaled: Scaled, argument: str) -> Any:
    """Return the config object with the scaled fields. A config class that overrules them is an error."""
    wanted = differences(before, scaled.fields)
    try:
        made = type(config).from_dict(scaled.fields)
    except Exception as error:
        raise ValueError(
            f"argument {argument}: {type(config).__name__} refuses the fields {_changes(wanted)}: {_told(error)} "
            f"{_remedy(argument)}"
        ) from error
    after = made.to_dict()
    for path, (_, new) in wanted.items():
        *parents, name = path.split(".")
        if section_at(after, parents).get(name) != new:
            raise ValueError(
                f"argument {argument}: {type(config).__name__} sets {path} to {section_at(after, parents).get(name)!r} by "
                f"itself, where {new!r} was asked for. It follows from other fields. {_remedy(argument)}"
            )
    return made


def _build(
    make: Callable[[Any], nn.Module], name: str, config: Any, whose: str, changed: Mapping[str, tuple[Any, Any]]
) -> nn.Module:
    try:
        import torch

        with torch.device("meta"):
            return make(config)
    except Exception as error:
        after = f" Fields that differ from the model: {_changes(changed)}. {_remedy('--base-width')}" if changed else ""
        raise ValueError(
            f"argument --hf: {name} cannot be built on the meta device as {whose}: {_told(error)}"
            f"{after or f' Correct the config; or {FACTORY}.'}"
        ) from error


def _remedy(argument: str) -> str:
    if argument == "--width":
        return f"Give another {argument}; or {FACTORY}."
    return f"Give the right value of a field with --set name=value, or another {argument}; or {FACTORY}."


def _changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{path} {old} -> {new}" for path, (old, new) in changed.items())


def _told(error: Exception) -> str:
    """Return an error of a library in one line that ends with a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}."
