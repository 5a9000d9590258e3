# SPDX-License-Identifier: Apache-2.0
"""The README's support table is what the family tests recorded."""

from tests import support


def test_readme_shows_the_recorded_results() -> None:
    table = support.table_in(support.README.read_text())
    assert table == support.render(support.load()), "run `make support`"


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    results = support.load()
    rows = [*results["supported"], *results["refused"]]
    assert sorted(rows) == sorted(support.tested_families()), "run `make support`"


def test_every_recorded_family_is_exact() -> None:
    for family, row in support.load()["supported"].items():
        for run in row["vllm"].values():
            assert 0 <= run["error"] < 1e-3, family
