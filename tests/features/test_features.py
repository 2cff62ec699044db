"""The table of features, docs/features.md, says what happens, has every cell, and has no other."""

from itertools import product

import pytest

from tests.features.table import FEATURES, TABLE, from_markdown, to_markdown
from tests.helpers.families import FAMILIES


@pytest.fixture(scope="module")
def cells():
    return from_markdown(TABLE.read_text())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("title", FEATURES)
def test_cell(cells, title, name):
    assert FEATURES[title](name) == cells[title, name]


def test_table_is_whole(cells):
    assert list(cells) == list(product(FEATURES, FAMILIES))
    verdicts = {cell.partition(": ")[0] for cell in cells.values()}
    assert verdicts == {"works", "refused", "refused by diffusers", "not in diffusers"}


def test_every_refusal_has_a_reason(cells):
    assert all(": " in cell for cell in cells.values() if cell.startswith("refused"))


def test_document_reads_back(cells):
    assert from_markdown(to_markdown(cells)) == cells
