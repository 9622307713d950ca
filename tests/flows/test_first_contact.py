"""Some of the trainings that first_contact.py generates; `python tests/flows/first_contact.py --cases 200` tries more."""

from __future__ import annotations

import pytest

from tests.flows.first_contact import Case, differences
from tests.support.spawn import run

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.mark.parametrize("seed", [2, 3, 7, 11, 26])
def test_one_process(seed):
    assert differences(Case.drawn(seed)) == []


@pytest.mark.parametrize("form", ["packed", "number of items", "shifted labels"])
def test_one_row_in_the_trainers_forms(form):
    assert differences(Case(form=form, rows=1, option="foreach", clip="torch", grows=1)) == []


def in_ranks(rank, world_size, seeds):
    return {seed: differences(Case.drawn(seed, world_size), rank, world_size) for seed in seeds}


def test_two_ranks():
    found = run(in_ranks, 2, [1, 4, 5], timeout=200)
    assert [said for rank in found for said in rank.values() if said] == []
