"""The report of a job: what it measures, and the page that tells it."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sqlalchemy import Engine

from tests.fasta_files import messy_fasta, read_naively
from tests.report_contents import FakeMatrix, contents_of, matrix_of, run_of
from virnucpro_core.errors import ServiceError
from virnucpro_core.features.matrices import Matrix
from virnucpro_core.htmlreport import contents
from virnucpro_core.htmlreport.lengths import count_residues, survey_lengths
from virnucpro_core.htmlreport.page import render
from virnucpro_core.htmlreport.sampling import SAMPLE_ROWS, draw_rows, project, take_sample
from virnucpro_core.htmlreport.speed import LEAST_STEP, MOST_LINES, MOST_STEPS, measure_speed
from virnucpro_core.ledger.work import Work
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.settings import Settings
from workers import reporting

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("rows", [0, 1, SAMPLE_ROWS, SAMPLE_ROWS + 1, 300_000, 10_000_000])
def test_rows_are_drawn_by_a_fixed_rule(rows: int) -> None:
    drawn = draw_rows(rows)
    assert len(drawn) == min(rows, SAMPLE_ROWS)
    assert (np.diff(drawn) > 0).all()
    assert drawn.tolist() == draw_rows(rows).tolist()
    if rows > 2 * SAMPLE_ROWS:
        assert (drawn < rows).all()
        assert abs(drawn.mean() / rows - 0.5) < 0.02  # from everywhere


def test_sample_holds_norms_and_records_of_its_rows() -> None:
    matrix = matrix_of(SAMPLE_ROWS + 500)
    sample = take_sample(matrix)
    rows = draw_rows(len(matrix))
    assert (sample.rows, len(sample.norms)) == (SAMPLE_ROWS + 500, SAMPLE_ROWS)
    assert sample.records.tolist() == matrix.records[rows].tolist()
    np.testing.assert_allclose(sample.norms, np.linalg.norm(matrix.embeddings[rows], axis=1), rtol=1e-5)
    assert take_sample(matrix_of(2)).projection is None
    assert len(take_sample(matrix_of(0)).norms) == 0


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(3, 12), st.integers(2, 12)),
        elements=st.floats(-100, 100, width=32),
    )
)
def test_projection_is_that_of_the_singular_value_decomposition(rows: np.ndarray) -> None:
    projection = project(rows)
    centred = rows - rows.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    total = np.square(singular).sum()
    np.testing.assert_allclose(
        np.square(projection.points).sum(axis=0), np.square(singular[:2]), atol=1e-6 * max(total, 1)
    )
    # Where a component is one of its own, its points are the same but for the sign, and the sign is the rule's.
    gaps = -np.diff(np.append(singular, 0)) if len(singular) < 3 else -np.diff(singular)
    for axis in range(2):
        if min(gaps[: axis + 1]) > 1e-2 * max(singular[0], 1):
            expected = left[:, axis] * singular[axis]
            sign = np.sign(expected @ projection.points[:, axis])
            np.testing.assert_allclose(projection.points[:, axis], sign * expected, atol=1e-4 * singular[0])
        column = projection.points[:, axis]
        assert column[np.abs(column).argmax()] >= 0
    assert (projection.shares >= 0).all()
    assert projection.shares.sum() <= 1 + 1e-9


@settings(deadline=None)
@given(messy_fasta)
def test_residues_are_counted_as_a_naive_reader_counts_them(data: bytes) -> None:
    data = b">first\n" + data
    assert count_residues(data).tolist() == [len(residues) for _, residues in read_naively(data)]


def test_lengths_of_all_records_and_of_those_asked_for() -> None:
    parts = {1: b">a\nMK\n>b\nMKVMKVMKV\n", 3: b">c\n\n>d\nMKV\n>e\nMKVM*\n"}
    chunks = [
        ChunkRange(
            ordinal=k,
            byte_start=0,
            byte_end=1,
            virtual_start=None,
            first_record=first,
            records=data.count(b">"),
            residues=0,
            sha256="",
        )
        for k, (first, data) in enumerate(parts.items())
    ]
    seen: list[tuple[int, int]] = []
    lengths = survey_lengths(
        chunks,
        lambda chunk: parts[chunk.first_record],
        limit=4,
        sampled=np.array([2, 3, 5]),
        on_progress=lambda *step: seen.append(step),
    )
    assert lengths.counts.tolist() == [1, 0, 1, 1, 1, 1]
    assert lengths.sampled.tolist() == [9, 0, 4]
    assert (lengths.longest, lengths.limit) == (9, 4)
    assert [lengths.quantile(share) for share in (0, 0.5, 0.8, 0.81, 1)] == [0, 3, 4, None, None]
    assert seen == [(2, 5), (5, 5)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"gpu{k}@host" for k in range(12)]),
            st.floats(0, 1e5),
            st.floats(0, 1e3),
            st.integers(0, 10**7),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_no_token_is_lost_between_the_steps_of_time(drawn: list[tuple[str, float, float, int]]) -> None:
    speed = measure_speed([run_of(*run) for run in drawn])
    assert speed is not None
    widths = np.diff(speed.edges)
    assert len(widths) <= MOST_STEPS
    assert len(speed.rates) <= MOST_LINES
    told = sum(float(rates @ widths) for rates in speed.rates.values())
    assert told == pytest.approx(sum(run[3] for run in drawn), rel=1e-6)
    assert sum(worker.tokens for worker in speed.workers) == sum(run[3] for run in drawn)
    assert sum(worker.chunks for worker in speed.workers) == len(drawn)


def test_speed_is_spread_over_the_time_that_a_chunk_took() -> None:
    speed = measure_speed([run_of("b@h", 10, 10, 1000), run_of("a@h", 0, 10, 2000)])
    assert speed is not None
    assert list(speed.rates) == ["a@h", "b@h"]
    assert speed.seconds == 20
    steps = int(20 / LEAST_STEP)
    np.testing.assert_allclose(speed.rates["a@h"], [200] * (steps // 2) + [0] * (steps // 2))
    np.testing.assert_allclose(speed.rates["b@h"], [0] * (steps // 2) + [100] * (steps // 2))
    assert measure_speed([]) is None


def pictures(page: str) -> list[str]:
    """The charts of a page, as SVG."""
    links = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(link).decode() for link in links]


def test_page_escapes_all_that_comes_from_outside() -> None:
    page = render(contents_of())
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 12
    charts = pictures(page)
    assert len(charts) == 4
    for chart in charts:
        ET.fromstring(chart)
        assert "<script" not in chart
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in chart and "$x_1$" in chart for chart in charts)


def test_page_asks_for_nothing() -> None:
    """Whatever refers to a place refers into the file; addresses in charts are names of dialects."""
    page = render(contents_of())
    assert "default-src 'none'" in page
    for text in (page, *pictures(page)):
        for place in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text):
            assert place.startswith(("data:image/", "#"))


def test_equal_contents_give_equal_pages() -> None:
    assert render(contents_of(500)) == render(contents_of(500))


def test_large_jobs_are_told_by_a_sample_that_is_stated() -> None:
    page = render(contents_of(SAMPLE_ROWS + 1))
    assert "From 5,000 of 5,001 rows" in page
    assert "numpy.random.default_rng(0)" in page
    assert len(page) < 1_000_000
    assert "From all 10 rows" in render(contents_of(10))


def test_what_is_not_there_is_left_out() -> None:
    page = render(contents_of(lengths=None, speed=None, sample=None, failures={}, first_failures=[]))
    assert pictures(page) == []
    assert "every record has an embedding" in page
    page = render(contents_of(sample=take_sample(matrix_of(0))))
    assert "There are none." in page
    assert 'id="projection"' not in page


@pytest.mark.parametrize(("failed", "too_many"), [(29, False), (30, True)])
def test_exactly_the_allowed_share_of_failures_is_no_warning(failed: int, too_many: bool) -> None:
    told = contents_of(50)  # of 100 records
    told.job.failed = failed
    page = render(replace(told, submission=replace(told.submission, max_failed_share=0.29)))
    assert ("More records failed than were allowed" in page) == too_many


def test_records_that_are_all_alike_have_a_page() -> None:
    same = cast("Matrix", FakeMatrix(np.arange(1, 6), np.ones((5, 8), dtype=np.float32)))
    page = render(contents_of(sample=take_sample(same), lengths=None))
    assert len(pictures(page)) == 3
    assert "colour" not in page.lower(), "without lengths all points are alike"
    assert "Colour is the length" in render(contents_of())


def try_report(tmp_path: Path) -> object:
    work = cast("Work", SimpleNamespace(job_id=1, artifact_folder=lambda: "jobs/1"))
    submission = contents_of().submission
    reporter = reporting.Reporter(cast("Engine", None), work, Settings(output_root=tmp_path))
    return reporter.try_report(submission, [])


def test_report_that_breaks_is_logged_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(contents, "gather", break_down)
    with structlog.testing.capture_logs() as logs:
        assert try_report(tmp_path) is None
    assert [(line["event"], line["log_level"]) for line in logs] == [("report_not_made", "error")]


def test_report_does_not_hide_that_the_ledger_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_ledger(*_: object, **__: object) -> None:
        raise ServiceError("the database is away")

    monkeypatch.setattr(contents, "gather", lose_ledger)
    with pytest.raises(ServiceError):
        try_report(tmp_path)
