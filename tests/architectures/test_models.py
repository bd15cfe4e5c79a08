"""The real models are as recorded, and have the recorded roles at every width. `make test-zoo` installs their packages."""

from __future__ import annotations

import pytest

from . import table
from .sizes import widths_of
from .test_skeletons import differences, recorded, roles

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
each_architecture = pytest.mark.parametrize("name", table.names())


def test_every_architecture_has_a_table() -> None:
    from .builders import ARCHITECTURES

    assert table.names() == sorted(ARCHITECTURES)


@each_architecture
def test_a_model_is_as_recorded(name: str) -> None:
    from .record import record

    assert table.render(record(name)) == (table.TABLES / f"{name}.txt").read_text()


@each_architecture
def test_a_model_has_the_recorded_roles_and_fan_ins(name: str) -> None:
    from .builders import ARCHITECTURES

    right = table.read(name)
    wrong = [
        differences(roles(ARCHITECTURES[name](width)), recorded(right, which))
        for which, width in enumerate(right.widths)
    ]
    assert wrong == [[], []]


@each_architecture
def test_roles_are_the_same_at_four_widths(name: str) -> None:
    from .builders import ARCHITECTURES

    found = [{n: role for n, (role, _) in roles(ARCHITECTURES[name](w)).items()} for w in widths_of(name)]
    assert all(other == found[0] for other in found[1:])
