"""The sizes in a config of transformers that follow the width of a model, and the config at another width.

This module works on the dict form of a config, so it needs no transformers. It knows fields by their names. Head dimensions
and low ranks stay, and the number of heads follows the width, as in the families of models that people train at several
widths. A field that it does not know stays too, and is reported.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

Path = tuple[str, ...]

WIDTH_NAMES: Final = ("hidden_size", "d_model", "n_embd", "n_embed", "emb_dim", "embed_dim", "dim", "embedding_dim")
_WIDTHS: Final = re.compile(
    "|".join(WIDTH_NAMES)
    + r"|(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|(\w+_)?ffn_hidden_size|d_?ff|dim_ff|n_inner|d_inner|mlp_dim|hidden_dim"
    r"|feed_forward_size|block_ff_dim|share_expert_dim|moe_hidden_size|(cross_)?attention_hidden_size|pooler_(hidden|output)_size"
    r"|lru_width|mamba_d_ssm|word_embed_proj_dim"
)
_HEADS: Final = re.compile(
    r"(\w+_)?attention_heads(_per_layer)?|(decoder_|encoder_)?num_heads|n_heads?|mamba_(n|num)_heads|n_mamba_heads"
    r"|linear_num(_value)?_heads"
)
_SHARED_HEADS: Final = re.compile(
    r"(\w+_)?key_value_heads|(num|n)_kv_heads|n_head_kv|num_query_groups|linear_num_key_heads"
)
# Ranks of Mamba's time step, which are a sixteenth of the width where the config says "auto".
_SIXTEENTHS: Final = ("time_step_rank", "mamba_dt_rank")
_LAYERS: Final = re.compile(r"num_hidden_layers|(num_|n_)?layers?|(num_)?(encoder|decoder)_layers|num_blocks")
# Nested configs that are parts of the text config's own layers.
PARTS: Final = ("attn_config", "ffn_config")
# Fields of a vision or audio tower that hold the width of the text model, into which the tower projects.
_OUT: Final = ("out_hidden_size", "text_hidden_size")
_FIXED: Final = re.compile(
    r"(\w+_)?head_?dim|(\w+_)?head_size|d_kv|d_head|dim_head|kv_channels|mamba_d_head|(\w+_)?rank|(\w+_)?state_size"
    r"|(\w+_)?d_state|(mamba_)?n_?groups|embedding_size|hidden_size_per_layer_input|index_n_heads|rotary_dim"
)
_LOOKS_LIKE_SIZE: Final = re.compile(
    r"size|dim|width|rank|hidden|channels|inner|units|features|heads|linear|^d_|_d_|ff|lowrank"
)
_NO_WIDTH: Final = re.compile(
    r"vocab|position|patch|image|kernel|chunk|window|block_size|layers|experts|group|token|mel_bins|conv|frame|distance|bucket"
    r"|per_tok|ngram|types|sampling|filter|(in|num|input|audio)_channels|num_features|merge|offset|multiple"
)


@dataclass
class Scaled:
    """A config at another width.

    Attributes:
        fields: the dict form of the new config.
        stays: fields of the text config that stay at every width, by their path.
        unknown: fields that stay because nothing is known about them, by their path.
        notes: sentences about single decisions.
    """

    fields: dict[str, Any]
    stays: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def width_field(section: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """Return the name of the field that holds the width of a config; None if there is none.

    Args:
        section: the dict form of the config.
        aliases: the config's attribute_map, which names the field that stands for hidden_size.
    """
    names = (aliases.get("hidden_size", "hidden_size"), *WIDTH_NAMES)
    return next((name for name in names if _is_size(section.get(name))), None)


def at_width(
    fields: Mapping[str, Any],
    following: Sequence[Path],
    width_name: str,
    width: int,
    argument: str,
    settings: Mapping[str, Any] | None = None,
    depth: int | None = None,
) -> Scaled:
    """Return a config at another width.

    Args:
        fields: the dict form of the whole config.
        following: paths of the nested configs that follow the width. The first one has the width; () is the config itself.
        width_name: name of the width in this first one.
        width: the new width.
        argument: name of the command's argument that gave the width, for messages.
        settings: values of single fields that win over everything, by path with dots.
        depth: the new number of layers, where the config has more; None: as many as it has.

    Raises:
        ValueError: a size does not come out whole, or `settings` names no field of the config.
    """
    settings = dict(settings or {})
    scaled = Scaled(copy.deepcopy(dict(fields)))
    _check_settings(scaled.fields, settings, ".".join((*following[0], width_name)), argument)
    own = section_at(fields, following[0])[width_name]
    sections = list(_sections(scaled.fields, following))
    job = _Job(scaled, Fraction(width, own), own, width, settings)
    for path, section in sections:
        job.scale(path, section)
    if job.problems:
        raise ValueError(job.complaint(argument))
    job.others([id(section) for _, section in sections])
    if depth is not None:
        for _, section in sections:
            _cut(section, depth)
    for name, value in settings.items():
        *parents, last = name.split(".")
        section_at(scaled.fields, parents)[last] = value
    return scaled


def section_at(fields: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the nested config at a path."""
    found: Any = fields
    for name in path:
        found = found[name]
    return found  # type: ignore[no-any-return]


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: Path = ()) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of every field that differs between two configs, by its path with dots."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in before:
        old, new = before[name], after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, (*path, name))
        elif old != new:
            found[".".join((*path, name))] = (old, new)
    return found


class _Job:
    """The scaling of one config, which collects everything that does not come out whole."""

    def __init__(self, scaled: Scaled, ratio: Fraction, own: int, width: int, settings: Mapping[str, Any]) -> None:
        self.scaled, self.ratio, self.own, self.width, self.settings = scaled, ratio, own, width, settings
        self.problems: dict[str, tuple[Any, Any, str]] = {}  # path: (old value, value that is possible, what is wrong)
        self.unit = 1  # Every field comes out whole at the multiples of this width.

    def scale(self, path: Path, section: dict[str, Any]) -> None:
        heads: dict[str, Any] = {}
        for name, value in list(section.items()):
            full = ".".join((*path, name))
            if full in self.settings:
                section[name] = self.settings[full]
            elif not _is_size(value):
                continue
            elif _WIDTHS.fullmatch(name) or _HEADS.fullmatch(name):
                section[name] = self._times(full, value, _HEADS.fullmatch(name) is not None)
            elif name in _SIXTEENTHS and value == math.ceil(self.own / 16):
                section[name] = math.ceil(self.width / 16)
            elif _SHARED_HEADS.fullmatch(name):
                if isinstance(value, list):
                    self.scaled.unknown[full] = value
            elif (_FIXED.fullmatch(name) or name in _SIXTEENTHS) and value != self.own:
                self.scaled.stays[full] = value
            elif _LOOKS_LIKE_SIZE.search(name) and not _NO_WIDTH.search(name) and not _LAYERS.fullmatch(name):
                self.scaled.unknown[full] = value
            if _HEADS.fullmatch(name) and isinstance(section[name], int):
                heads[name] = section[name]
        for name, value in list(section.items()):
            full = ".".join((*path, name))
            if _SHARED_HEADS.fullmatch(name) and isinstance(value, int) and value and full not in self.settings:
                section[name] = self._shared(full, value, _partner(name, heads))

    def _times(self, full: str, value: Any, of_heads: bool) -> Any:
        """Return a size, or a list of sizes, times the ratio of the widths."""
        olds = value if isinstance(value, list) else [value]
        news = [old * self.ratio for old in olds]
        self._count(*olds)
        whole = all(new.denominator == 1 for new in news)
        made = [_most_heads(self.width, new) if of_heads and not whole else max(1, round(new)) for new in news]
        result = made if isinstance(value, list) else made[0]
        if not whole:
            self.problems[full] = (value, result, f"would be {', '.join(f'{float(new):.6g}' for new in news)}")
        return result

    def _shared(self, full: str, value: int, heads: int | None) -> int:
        """Return a number of heads that groups of other heads share, such as keys and values."""
        if value > 1:
            self._count(value)
        new = value * self.ratio
        if new.denominator == 1:
            return int(new)
        if heads is None or heads % value == 0:
            self.scaled.notes.append(
                f"{full} stays {value}: its share of the width would be {float(new):.6g}. This changes no fan_in."
            )
            return value
        possible = max(n for n in range(1, max(1, math.floor(new)) + 1) if heads % n == 0)
        self.problems[full] = (value, possible, f"would be {float(new):.6g}, and {value} does not divide {heads} heads")
        return possible

    def _count(self, *values: int) -> None:
        self.unit = math.lcm(self.unit, *(self.own // math.gcd(value, self.own) for value in values))

    def complaint(self, argument: str) -> str:
        listed = "; ".join(f"{path}={value} {wrong}" for path, (value, _, wrong) in self.problems.items())
        settings = " ".join(
            f"--set {shlex.quote(f'{path}={_compact(new)}')}" for path, (_, new, _) in self.problems.items()
        )
        remedies = [f"Give {argument} a multiple of {self.unit}"]
        if argument == "--base-width":
            remedies.append(f"say what these are at the proxy, for example {settings}")
            if self.unit == self.own:  # Then no smaller width will do.
                remedies = [f"S{remedies[1][1:]}"]
        return (
            f"argument {argument}: the width goes from {self.own} to {self.width}, and these fields do not come out whole: "
            f"{listed}. {', or '.join(remedies)}."
        )

    def others(self, scaled: Sequence[int]) -> None:
        """Deal with the configs that do not follow the width: only what they project into the text model follows."""
        for path, section in _nested(self.scaled.fields):
            if id(section) in scaled:
                continue
            for name, value in section.items():
                full = ".".join((*path, name))
                if not isinstance(value, bool) and value == self.own and full not in self.settings:
                    if name in _OUT:
                        section[name] = self.width
                    elif _LOOKS_LIKE_SIZE.search(name) and not _NO_WIDTH.search(name):
                        self.scaled.unknown[full] = value


def _most_heads(width: int, most: Fraction) -> int:
    """Return a number of heads that share a width equally, with an even size if possible, as rotary positions need."""
    possible = [n for n in range(1, max(1, math.floor(most)) + 1) if width % n == 0]
    return max([n for n in possible if width // n % 2 == 0] or possible)


def _is_size(value: object) -> bool:
    """Return whether a value is a positive whole number, or a list of such numbers."""
    if isinstance(value, list):
        return bool(value) and all(_is_size(part) and not isinstance(part, list) for part in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _partner(name: str, heads: Mapping[str, int]) -> int | None:
    """Return the number of heads that share the heads which a field counts."""
    if name == "linear_num_key_heads":
        return heads.get("linear_num_value_heads")
    wanted = name.replace("key_value_heads", "attention_heads")
    if wanted in heads:
        return heads[wanted]
    return next((heads[name] for name in ("num_attention_heads", "n_heads", "n_head") if name in heads), None)


def _sections(fields: dict[str, Any], following: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in following:
        section = section_at(fields, path)
        yield path, section
        for part in PARTS:
            if isinstance(section.get(part), dict):
                yield (*path, part), section[part]


def _nested(fields: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    yield path, fields
    for name, value in fields.items():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield from _nested(value, (*path, name))


def _cut(section: dict[str, Any], depth: int) -> None:
    """Take layers from a config, and their entries from the lists with one entry per layer."""
    counts = {n: v for n, v in section.items() if _LAYERS.fullmatch(n) and _is_size(v) and not isinstance(v, list)}
    for name, value in list(section.items()):
        if name in counts:
            section[name] = min(value, depth)
        elif isinstance(value, list) and len(value) in counts.values() and len(value) > depth:
            section[name] = value[:depth]


def _check_settings(fields: dict[str, Any], settings: Mapping[str, Any], width_path: str, argument: str) -> None:
    paths = [".".join((*path, name)) for path, section in _nested(fields) for name in section]
    for name in settings:
        if name == width_path:
            raise ValueError(
                f"argument --set: {name} is the width itself. Give it with {argument}, and leave out --set."
            )
        if name not in paths:
            ends = [path for path in paths if path.endswith(f".{name}")]
            close = ends or difflib.get_close_matches(name, paths, n=3)
            hint = f" Closest: {', '.join(map(repr, close))}." if close else " Give a field of config.json."
            raise ValueError(f"argument --set: the config has no field {name!r}.{hint}")


def _compact(value: Any) -> str:
    return repr(value).replace(" ", "")
