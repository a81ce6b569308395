"""The page stands alone, is well formed, escapes what a server sends, stays small and shows what was found."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from numpy.testing import assert_allclose

from opcua_detector.api import Record, Tag
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.engine import AlertSettings, RowMonitor
from opcua_detector.errors import PluginError
from opcua_detector.evaluation import Alert, Replay, evaluate, replay
from opcua_detector.fitting import fit_monitor
from opcua_detector.report import Section, TimeAxis, make_section, page, render
from opcua_detector.report.plots import HEAT_BINS, LINE_BINS, clean, heat, short
from opcua_detector.report.timeaxis import Stretches
from opcua_detector.report.transitions import transition_maps
from sim_server.processes import Fault
from tests.plants import deviation_monitor, lorenz_rows, noise_record, record_of, sharp_monitor

HOUR_NS = 3_600_000_000_000
VOID = {"meta", "wbr", "br", "img", "link", "hr", "input"}
HOSTILE = "<script>alert(1)</script>"
NASTY = '"/><img src=x onerror=alert(2)>'
MATHS = "$\\frac{1}{"
BELL = "bell\x07\u202eturn</svg></style>"


class Page(HTMLParser):
    """Checks nesting and gathers what a test looks at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            self.refers |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name.endswith("href"):
                assert value is not None and (value.startswith("#") or value.startswith("data:image/png;")), value
                self.refers |= {value[1:]} if value.startswith("#") else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)

    @property
    def words(self) -> str:
        """The text of the page with single spaces."""
        return " ".join(" ".join(self.text).split())


def checked(text: str) -> Page:
    """Parse a page and check what holds for every one."""
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert found.refers <= set(found.ids)
    assert not set(found.tags) & {"script", "link", "iframe", "object", "img", "embed", "base", "form"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', "", text)  # base64 may spell anything
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_pictures)
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    return found


def section_of(monitor: RowMonitor, record: Record, maps: tuple[str, ...] = ()) -> Section:
    said = replay(record, monitor, edges=TimeAxis.of(record).borders(HEAT_BINS))
    return make_section(monitor.model, record, said, evaluate(record, said, budget_per_day=1.0), "a test", maps)


@cache
def lorenz_section() -> Section:
    record = lorenz_rows(8000, 5, Fault("beta", 1.25, 3000, 4500), Fault("rho", 1.3, 6500, 7000))
    return section_of(sharp_monitor(record.tags, AlertSettings(off_delay_ns=500_000_000)), record)


@cache
def lorenz_page() -> str:
    return render([lorenz_section()], 1_767_225_600_000_000_000)


def test_the_page_stands_alone_and_is_well_formed() -> None:
    found = checked(lorenz_page())
    assert found.tags.count("svg") >= 6
    assert len(lorenz_page()) < 1_000_000


def test_the_page_says_what_was_found_in_words() -> None:
    section = lorenz_section()
    words = checked(lorenz_page()).words
    point = section.found.point
    assert point is not None and point.detected == 2
    for text in ("Monitor lorenz", section.said.model_id, "2 of 2", "x1", "x3", "8000 rows every 0.01 s",
                 "12000 rows", "1970-01-01", "false alarm a day", "report made 2026-01-01 00:00:00 UTC"):
        assert text in words, text
    for heading in ("What was looked at", "Score over time", "Alerts", "Known faults, one by one", "Tags over time",
                    "Which tag carried the score, and when", "Alerts against the budget",
                    "Does the limit fit this recording?", "Movements seen and unseen"):
        assert heading in words, heading
    assert section.found.ranking is not None and f"{section.found.ranking.auc:.3f}" in words
    for alert in section.said.alerts:
        for text in (alert.sentence, *(cause for _, cause, _ in alert.causes)):
            assert "".join(text.split()) in "".join(words.split())


def test_the_page_is_the_same_each_time() -> None:
    assert render([lorenz_section()], 1_767_225_600_000_000_000) == lorenz_page()


def test_two_monitors_share_one_page_and_no_id() -> None:
    found = checked(render([lorenz_section(), lorenz_section()], 0))
    assert found.tags.count("section") == 2 and found.tags.count("nav") == 1


def test_what_a_server_sends_is_escaped_everywhere() -> None:
    tags = [Tag(HOSTILE, unit="<b>"), Tag(NASTY, unit="&amp;"), Tag(MATHS), Tag(BELL, unit="\x00"),
            Tag("x" * 300), Tag("constant</td>", unit=HOSTILE)]
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((4000, 6))
    rows[:, 5] = 24.0
    fit = record_of(rows, tags)
    values = rng.standard_normal((3000, 6))
    values[:, 5] = 24.0
    truth = np.zeros(3000, np.uint8)
    for i in range(5):
        values[500 * i + 200:500 * i + 300, i] += 30
        truth[500 * i + 200:500 * i + 300] = 1
    monitor = deviation_monitor(fit, alert=AlertSettings(off_delay_ns=50_000_000))
    section = section_of(monitor, record_of(values, tags, truth=truth))
    assert {a.top_tag for a in section.said.alerts} >= {tag.name for tag in tags[:5]}
    section = dataclasses.replace(section, source=f"file {HOSTILE}.csv")
    text = render([section], 0)
    text.encode("utf-8")
    found = checked(text)
    assert "<script" not in text and "<img" not in text and "<b>]" not in text
    for name in (HOSTILE, NASTY, MATHS):
        assert "".join(name.split()) in "".join(found.words.split())
    assert "\x07" not in text and "\u202e" not in text and "constant</td>" in "".join(found.text)


def test_names_are_cleaned_and_cut_from_the_middle() -> None:
    assert clean("a\x00b\u2028\ud800c") == "a?b\u2028?c" and clean("Druck \u00b0C \u6e29") == "Druck \u00b0C \u6e29"
    cut = short("Line4.Reactor1.TemperatureInlet.Measured_00", 20)
    assert len(cut) == 20 and cut.startswith("Line4") and cut.endswith("_00")


def test_ten_million_rows_stay_a_small_page() -> None:
    n, k = 10_000_000, 2
    step = np.arange(n, dtype=np.int64)
    values = np.empty((n, k))
    values[:, 0] = np.sin(step / 5e4) + (step % 7919) / 7919
    values[:, 1] = np.cos(step / 9e5)
    record = Record((Tag("x1"), Tag("x3")), 10_000_000, step * 10_000_000, values, np.ones((n, k), np.uint8),
                    (step == 0).astype(np.uint8), ((step // 400_000) % 5 == 3).astype(np.uint8))
    model = lorenz_section().model
    alert = (step // 1000) % 4 == 0
    begins = np.flatnonzero(np.diff(alert.astype(np.int8), prepend=0) == 1)
    alerts = tuple(Alert(i + 1, int(b), int(b) + 1000, int(b) * 10_000_000, (int(b) + 1000) * 10_000_000, 2.0, "x1",
                         "x1 is off " * 15, (("x1", "again " * 30, 0.5),) * 3, True) for i, b in enumerate(begins))
    score = np.where(alert, 2.0, 0.3) + values[:, 0] / 10
    lead = np.full((HEAT_BINS, k), 0.5, np.float32)
    said = Replay("lorenz", model.model_id, ("x1", "x3"), score, score * 0.5, alert, np.zeros(n, np.uint32), lead,
                  np.full(HEAT_BINS, 2.0, np.float32), np.ones(k), alerts)
    # The ranking of ten million rows takes its time and changes nothing of the page's size.
    found = evaluate(dataclasses.replace(record, truth=None), said, budget_per_day=1.0)
    model = dataclasses.replace(model, methods=())
    text = render([Section(model, record, said, found, "a long one")], 0)
    checked(text)
    assert len(text.encode()) < 1_500_000
    assert "2300 of 2500 alerts are not listed" in Page(text).words


@pytest.mark.parametrize("k", [1, 100])
def test_one_tag_and_a_hundred_fit(k: int) -> None:
    names = [f"Line4.Reactor{i // 5}.Temperature_{i:03d}" for i in range(k)]
    monitor = deviation_monitor(noise_record(3000, names, seed=1))
    record = noise_record(2500, names, seed=2)
    record.values[1000:1100] += np.linspace(30, 10, k)
    text = render([section_of(monitor, record)], 0)
    words = checked(text).words
    assert len(text) < 2_000_000
    assert f"The 20 of {k} tags" in words if k > 20 else "Those that carried" in words
    assert any(words.count(name) >= 2 for name in names)


@pytest.mark.parametrize("rows", [5, 60])
def test_a_nearly_empty_recording_gives_a_page(rows: int) -> None:
    monitor = deviation_monitor(noise_record(3000, ["a", "b"], seed=1))
    words = checked(render([section_of(monitor, noise_record(rows + 20, ["a", "b"], seed=2))], 0)).words
    assert "No alert was raised" in words and "too short to check a budget" in words


def test_masked_rows_and_holes_are_drawn_and_told() -> None:
    monitor = deviation_monitor(noise_record(3000, ["a", "b"], seed=1))
    record = noise_record(3000, ["a", "b"], seed=2)
    record.valid[500:900, 0] = 0
    record.valid[2900:, :] = 0
    source_ns = record.source_ns.copy()
    source_ns[1500:] += 72 * HOUR_NS
    record.gap[1500] = 1
    record = dataclasses.replace(record, source_ns=source_ns)
    words = checked(render([section_of(monitor, record)], 0)).words
    assert "hole of 3 d" in words and "1 hole" in words and "no verdict" in words and "of the values were not valid" \
        in words


def test_the_missing_extra_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(PluginError, match="needs jinja2") as caught:
        render([lorenz_section()], 0)
    assert caught.value.next_step == 'pip install "opcua-detector[report]"'


def test_a_map_of_a_tag_that_has_none_is_refused() -> None:
    section = lorenz_section()
    with pytest.raises(PluginError, match="no transition map of x9") as caught:
        make_section(section.model, section.record, section.said, section.found, "", ("x9",))
    assert "x1, x3" in caught.value.next_step
    chosen = make_section(section.model, section.record, section.said, section.found, "", ("x1",))
    assert "more are left out" not in Page(render([chosen], 0)).words


# --- transitions ---


def test_maps_count_what_the_method_judges() -> None:
    tags = [Tag("x1"), Tag("x3")]
    fit = lorenz_rows(12_000, 1)
    plugin = TransitionPlugin()
    model, _ = fit_monitor("m", fit, [("transition", plugin, TransitionParams(levels=12))])
    rows = lorenz_rows(6000, 8, Fault("rho", 1.4, 2000, 4000))
    rng = np.random.default_rng(0)
    valid = (rng.random((6000, 2)) > 0.02).astype(np.uint8)
    gap = np.zeros(6000, np.uint8)
    gap[[700, 705, 3100]] = 1
    record = record_of(rows.values, tags, valid=valid, gap=gap)
    method = plugin.open(model.methods[0], model.plan.columns)
    trans = method.residuals(model.plan.prepare(record))[:, :2]
    for one in transition_maps(model, record):
        judged = trans[:, ["x1", "x3"].index(one.column)]
        assert one.total == np.isfinite(judged).sum() and one.unseen == np.nansum(judged) > 0
        assert one.learnt.sum() == (model.methods[0].arrays["table"][["x1", "x3"].index(one.column)] >= 0).sum()


def test_maps_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    section = lorenz_section()
    whole = transition_maps(section.model, section.record)
    monkeypatch.setattr("opcua_detector.report.transitions.CHUNK", 777)
    for a, b in zip(whole, transition_maps(section.model, section.record), strict=True):
        assert a.column == b.column and (a.made == b.made).all()
    assert transition_maps(dataclasses.replace(section.model, methods=()), section.record) == []


# --- the time axis ---


def test_long_holes_are_drawn_short_and_ticks_are_round_utc_times() -> None:
    record = record_of(np.zeros((60_000, 1)), ["a"])
    source_ns = record.source_ns + 1_767_225_590_000_000_000  # 2025-12-31T23:59:50Z
    source_ns[30_000:] += 48 * HOUR_NS
    axis = TimeAxis.of(dataclasses.replace(record, source_ns=source_ns))
    assert axis.length == pytest.approx(600 * 1.02)
    ((place, seconds),) = axis.holes
    assert 300 < place < 312 and seconds == pytest.approx(48 * 3600)
    places, labels = axis.ticks()
    assert 3 <= len(places) <= 12 and (np.diff(places) > 0).all()
    assert labels[0] == "00:00\n2026-01-01" and any("2026-01-03" in label for label in labels)
    assert places[0] == pytest.approx(10)
    assert_allclose(axis.place(source_ns[[0, 29_999, 59_999]]), [0, 299.99, axis.length - 0.01])


def test_a_line_of_many_rows_keeps_its_peaks_and_its_holes() -> None:
    n = 50_000
    values = np.zeros((n, 1))
    values[12_345], values[40_000] = 9.0, -7.0
    record = record_of(values, ["a"], valid=np.where(np.arange(n)[:, None] // 5000 == 5, 0, 1))
    lines = Stretches.of(record, TimeAxis.of(record), LINE_BINS)
    x, y = lines.line(record.values[:, 0], record.valid[:, 0])
    assert len(x) == len(y) == 2 * LINE_BINS and (np.diff(x) >= 0).all()
    assert np.nanmax(y) == 9.0 and np.nanmin(y) == -7.0
    assert x[np.nanargmax(y)] == pytest.approx(123.45, abs=0.5)
    assert np.isnan(y[(x > 250.5) & (x < 299.5)]).all() and not np.isnan(y[x < 249]).any()
    spans = lines.spans((np.arange(n) == 777).astype(np.uint8))
    assert len(spans) == 1 and spans[0][0] <= 7.77 <= sum(spans[0]) and spans[0][1] == pytest.approx(0.5)


def test_few_rows_are_drawn_one_by_one_and_broken_at_holes() -> None:
    record = record_of(np.arange(40.0)[:, None], ["a"], gap=(np.arange(40) == 20).astype(np.uint8))
    x, y = Stretches.of(record, TimeAxis.of(record), LINE_BINS).line(record.values[:, 0])
    assert len(y) == 41 and np.isnan(y[20]) and np.nansum(y) == np.arange(40).sum()
    assert np.isnan(x[20])


def test_the_heat_fades_below_the_limit_and_leaves_out_who_carried_nothing() -> None:
    said = dataclasses.replace(
        lorenz_section().said, tags=("a", "b", "c"), peak=np.array([np.nan, 0.4, 0.8, 3.0], np.float32),
        lead=np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0.01, 0.97, 0.02]], np.float32))
    names, strength = heat(said, ["b", "a", "c"])
    assert names == ["b", "a"]
    assert_allclose(strength, [[0, 0, 0.32, 0.97], [0, 0, 0.32, 0.01]], atol=1e-6)
