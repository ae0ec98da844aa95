"""The audit on a table with known faults, and on the published one of Model Recycling where it is at hand."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hubfusion.data.suite import load_suite
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.audit import FindingKind, Table, audit, move_right, read_table

SIZES = {"a": 1043, "b": 408, "c": 277, "d": 1066, "e": 500}
LEVELS = {"a": 0.83, "b": 0.88, "c": 0.60, "d": 0.45, "e": 0.97}
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "reference" / "recycling"


def honest_rows(n: int = 8) -> list[list[float]]:
    """n models within a few examples of their levels, as fractions k/n of the test sizes."""
    return [[(round(SIZES[d] * LEVELS[d]) + (i * k) % 5) / SIZES[d] for k, d in enumerate(SIZES)] for i in range(n)]


def write(path: Path, rows: list[list[float]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model_name", "base_model", "size", *SIZES])
        writer.writerows([f"m{i}", "bert", 1e8, *map(repr, row)] for i, row in enumerate(rows))
    return path


def test_an_honest_table_has_no_findings(tmp_path):
    assert audit(read_table(write(tmp_path / "t.csv", honest_rows()), list(SIZES)), SIZES) == []


def test_fractions_are_read_as_percentages_and_foreign_columns_are_left_alone(tmp_path):
    table = read_table(write(tmp_path / "t.csv", honest_rows()))
    assert table.datasets == ("a", "b", "c", "d", "e")  # not size: 1e8 is no score
    assert table.values[0, 0] == pytest.approx(100 * 866 / 1043)


def test_a_shifted_row_is_found_with_the_column_it_starts_at(tmp_path):
    rows = honest_rows()
    a, b, c, d, e = rows[3]
    rows[3] = [a, c, d, e, e]  # from b on, each value is that of the column to its right; the last comes twice
    findings = audit(read_table(write(tmp_path / "t.csv", rows), list(SIZES)), SIZES)
    shifted = [f for f in findings if f.kind is FindingKind.SHIFTED]
    assert [(f.row, f.model, f.datasets) for f in shifted] == [(3, "m3", ("d", "e"))]
    realignment = shifted[0].realignment
    assert realignment is not None
    assert (realignment.start, realignment.end) == ("b", "e")
    assert realignment.after < 1.5 < 5 < realignment.before
    assert {f.row for f in findings} == {3}
    off = next(f for f in findings if f.kind is FindingKind.OFF_GRID)
    assert set(off.datasets) == {"b", "c", "d"}


def test_moving_right_restores_what_a_shift_left():
    moved = move_right(np.array([1.0, 3.0, 4.0, 5.0, 5.0]), 1, 4)
    np.testing.assert_array_equal(moved, [1.0, np.nan, 3.0, 4.0, 5.0])


def test_a_copy_between_columns_of_coprime_test_sizes_is_found_and_a_coincidence_is_not(tmp_path):
    rows = honest_rows()
    rows[2][0] = rows[2][3]  # 1043 and 1066 have no common divisor
    findings = audit(read_table(write(tmp_path / "t.csv", rows), list(SIZES)), SIZES)
    assert [(f.row, f.datasets) for f in findings if f.kind is FindingKind.COPIED] == [(2, ("a", "d"))]
    half = [[0.5, 0.5] for _ in range(6)]
    table = Table(tuple("abcdef"), ("x",) * 6, ("a", "b"), 100 * np.array(half), 14)
    assert audit(table, {"a": 408, "b": 500}) == []  # 204 of 408 and 250 of 500


def test_a_value_far_from_its_architecture_is_implausible(tmp_path):
    rows = honest_rows()
    rows[5][4] = 0.5
    findings = audit(read_table(write(tmp_path / "t.csv", rows), list(SIZES)), SIZES)
    assert [(f.row, f.kind, f.datasets) for f in findings] == [(5, FindingKind.IMPLAUSIBLE, ("e",))]


def test_a_repeated_model_and_missing_scores_are_named(tmp_path):
    path = write(tmp_path / "t.csv", honest_rows())
    lines = path.read_text().splitlines()
    lines += [lines[1], f"m9,bert,1e8,{866 / 1043!r},,,,"]
    path.write_text("\n".join(lines))
    findings = audit(read_table(path, list(SIZES)), SIZES)
    assert [(f.row, f.kind, f.datasets) for f in findings] == [
        (8, FindingKind.REPEATED, ()),
        (9, FindingKind.INCOMPLETE, ("b", "c", "d", "e")),
    ]


def test_rounded_tables_are_not_blamed_for_their_rounding(tmp_path):
    rows = [[round(v, 4) for v in row] for row in honest_rows()]
    assert audit(read_table(write(tmp_path / "t.csv", rows), list(SIZES)), SIZES) == []


def test_what_is_no_table_is_refused_in_one_line(tmp_path):
    (tmp_path / "t.csv").write_text("name,text\nm,hello\n")
    with pytest.raises(EvaluationError, match="at least 2 columns of scores"):
        read_table(tmp_path / "t.csv")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not at hand")
class TestPublishedTable:
    @pytest.fixture(scope="class")
    def findings(self):
        datasets = load_suite("recycling36").datasets
        sizes = {d.name: d.test_size for d in datasets if d.test_size and d.metric == "accuracy"}
        self.__class__.table = read_table(PUBLISHED / "models_tested.csv", [d.name for d in datasets])
        return audit(self.table, sizes)

    def test_the_136_shifted_rows_are_found(self, findings):
        rows = {f.row for f in findings if f.kind is FindingKind.SHIFTED and f.datasets == ("esnli", "anli")}
        assert len(rows) == 136

    def test_the_muppet_row_is_realigned_to_the_published_correction(self, findings):
        found = next(f for f in findings if f.kind is FindingKind.SHIFTED and f.model == "facebook/muppet-roberta-base")
        assert found.realignment is not None
        assert (found.realignment.start, found.realignment.end) == ("dbpedia", "anli")
        names = self.table.datasets
        moved = move_right(self.table.values[found.row], names.index("dbpedia"), names.index("anli"))
        with (PUBLISHED / "coldfusion_paper_table1_realigned.csv").open() as file:
            published = {r["key"]: r["muppet_realigned"] for r in csv.DictReader(file) if r["muppet_realigned"]}
        assert len(published) == 34
        for name, value in published.items():
            assert moved[names.index(name)] == pytest.approx(float(value), abs=0.01), name

    def test_moved_values_lie_on_the_grid_of_their_own_test_set(self, findings):
        """Independent evidence for the realignment: as printed 20 of MUPPET's values are no share of their test set."""
        off = next(f for f in findings if f.kind is FindingKind.OFF_GRID and f.model == "facebook/muppet-roberta-base")
        assert len(off.datasets) == 20
        row = self.table.models.index("facebook/muppet-roberta-base")
        names = self.table.datasets
        moved = move_right(self.table.values[row], names.index("dbpedia"), names.index("anli"))
        sizes = {d.name: d.test_size for d in load_suite("recycling36").datasets if d.metric == "accuracy"}
        for name, value in zip(names, moved.tolist(), strict=True):
            if name in sizes and value == value:
                assert value * sizes[name] / 100 == pytest.approx(round(value * sizes[name] / 100), abs=1e-4), name

    def test_seven_models_come_twice(self, findings):
        assert Counter(f.kind for f in findings)[FindingKind.REPEATED] == 7
