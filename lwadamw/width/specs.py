"""Roles as a user or the registry gives them: the name of a role, or a role with the dimensions that are its fan_in."""

from __future__ import annotations

from dataclasses import dataclass

from .rules import ROLES, Role


@dataclass(frozen=True, slots=True)
class Matrix:
    """The role `matrix` for a tensor of any shape.

    Args:
        fan_in: the dimension of the tensor whose size is the fan_in, or several dimensions, whose sizes are multiplied. For
            packed experts it is -1 if their shape is (experts, out, in), and -2 if their shape is (experts, in, out). For a
            convolution of shape (out, in, height, width) it is (1, 2, 3).
        per: name of an attribute of the module, by which the size is divided: the number of experts where the inputs of all
            experts share one dimension.
    """

    fan_in: int | tuple[int, ...] = -1
    per: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """The role `output` (untied head, router) for a tensor of any shape.

    Args:
        fan_in: the dimension of the tensor whose size is the fan_in, or several dimensions, whose sizes are multiplied.
    """

    fan_in: int | tuple[int, ...] = -1


RoleSpec = Role | Matrix | Output


def check_spec(spec: object) -> None:
    """Raise a ValueError if this is not a role as a user gives it.

    Args:
        spec: anything.

    Raises:
        ValueError: it is no role, or its `fan_in` is neither an int nor a tuple of ints.
    """
    if isinstance(spec, (Matrix, Output)):
        dims = spec.fan_in if isinstance(spec.fan_in, tuple) else (spec.fan_in,)
        if dims and all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims):
            return
        raise ValueError(
            f"{spec!r} is not a role: fan_in is the number of a dimension, like -1, or a tuple of such numbers, like (1, 2, 3)."
        )
    if spec not in ROLES:
        raise ValueError(
            f"{spec!r} is not a role. Roles are {', '.join(ROLES)}, Matrix(fan_in=dim), Output(fan_in=dim)."
        )
