"""Build a model from `module:factory` on the meta device, where it takes no memory."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import nn

EXAMPLE: Final = "mypackage.models:build"


def build(argument: str, path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a factory on the meta device, and return its model.

    Args:
        argument: name of the command's argument that gave the path, for messages.
        path: `module:factory`. The module is also looked for in the current folder.
        arguments: keyword arguments for the factory.

    Raises:
        ValueError: the factory cannot be imported or called, fails, or does not return a model.
    """
    import torch
    from torch import nn

    factory = find(argument, path)
    try:
        signature = inspect.signature(factory)
    except ValueError:
        pass  # Some functions written in C have no signature.
    else:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            shown = signature.replace(return_annotation=inspect.Signature.empty)
            remedy = "Write" if argument == "--base" else "Give them with --args k=v, or write"
            raise ValueError(
                f"argument {argument}: {path}{shown} cannot be called with {dict(arguments)}: {error}. {remedy} a "
                "function that takes no arguments and returns the model."
            ) from None
    try:
        with torch.device("meta"):
            model = factory(**arguments)
    except Exception as error:
        inside = os.path.dirname(torch.__file__)
        frame = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside)][-1]
        where = f"{frame.filename}:{frame.lineno}"
        raise ValueError(
            f"argument {argument}: {path} fails on the meta device: {type(error).__name__}: {error} ({where}). "
            "The meta device cannot build a model that reads values, loads weights or moves to a device. Leave these steps "
            "out of the function; or call lwadamw.summary(lwadamw.param_groups(model, ...)) in your program."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"argument {argument}: {path} returned {type(model).__name__}, not a torch.nn.Module. Return the model."
        )
    return model


def find(argument: str, path: str) -> Callable[..., object]:
    """Import a class or function.

    Args:
        argument: name of the command's argument that gave the path, for messages.
        path: `module:factory`. The module is also looked for in the current folder.

    Raises:
        ValueError: it cannot be imported, or it is no class or function.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"argument {argument}: {path!r} is not of the form module:factory, like {EXAMPLE}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"argument {argument}: importing {module_name!r} fails: {error}. Install the missing module, or run the "
                "command in the folder that holds it."
            ) from error
        raise ValueError(
            f"argument {argument}: no module {error.name!r}. Give a dotted name, not a path, that can be "
            f"imported from {os.getcwd()!r}."
        ) from error
    except Exception as error:
        raise ValueError(
            f"argument {argument}: importing {module_name!r} fails: {type(error).__name__}: {error}. "
            "Name a module that can be imported without the rest of the program."
        ) from error
    try:
        factory = operator.attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, [name for name in vars(module) if not name.startswith("_")], n=1)
        hint = f" Closest: {close[0]!r}." if close else " Give a class or function of that module."
        raise ValueError(f"argument {argument}: module {module_name!r} has no {attribute!r}.{hint}") from None
    from torch import nn

    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(
            f"argument {argument}: {path} is a {type(factory).__name__}, not a class or function. Name the class or function "
            "that builds the model, so that the model can be built on the meta device."
        )
    return factory  # type: ignore[no-any-return]


def literal(text: str) -> tuple[str, Any]:
    """Split `name=value` into the name and the value.

    Args:
        text: the value is a Python literal.

    Raises:
        ValueError: the text has another form.
    """
    name, equals, value = text.partition("=")
    try:
        if not (equals and name.isidentifier()):
            raise ValueError(text)
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"argument --args: {text!r} is not name=value with a Python literal, like depth=4 or kind='\"gelu\"'."
        ) from None
