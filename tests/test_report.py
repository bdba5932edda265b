"""The HTML report: escaping, gaps, ticks within range, files that stand alone and are the same every time."""

import base64
import html.parser
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.errors import UserError
from nd_jax.report import html as report
from nd_jax.report import plots
from nd_jax.report.html import BarPlot, Command, Details, Image, LinePlot, Section, Series, Table, Text, Video

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(32)
HOSTILE = "<script>alert('x')</script>\"' onload=\"y\" &amp; \x00"

finite = st.floats(-1e30, 1e30, allow_nan=False)


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, in order; raises on a closing tag without its opening one."""

    VOID = ("meta", "img")

    def __init__(self, document: str):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def every_block(text: str) -> list[report.Block]:
    """One block of each kind, `text` wherever text can be given."""
    return [
        Text(text),
        Command(text),
        Table([text], [[text]], caption=text),
        LinePlot(text, text, text, [Series(text, [0, 1], [1.0, 2.0]), Series(text, [0], [None])], log_y=True),
        LinePlot(text, text, text, []),
        BarPlot(text, [text], [1.0], unit=text),
        Image(PNG, text, text),
        Video(MP4, text, text),
        Details(text, [Text(text)]),
    ]


def document(*blocks: report.Block) -> str:
    return report.render_report("title", {}, [Section("heading", blocks)])


def test_nothing_that_is_passed_in_becomes_markup():
    hostile = report.render_report(HOSTILE, {HOSTILE: HOSTILE}, [Section(HOSTILE, every_block(HOSTILE))] * 2)
    harmless = report.render_report("a", {"a": "a"}, [Section("a", every_block("a"))] * 2)
    tags = [(tag, sorted(attrs)) for tag, attrs in Elements(hostile).found]
    assert tags == [(tag, sorted(attrs)) for tag, attrs in Elements(harmless).found]
    assert HOSTILE in "".join(Elements(hostile).text)


def test_the_file_stands_alone():
    found = Elements(report.render_report("a", {"b": 1}, [Section("c", every_block("d"))])).found
    names = {tag for tag, _ in found}
    assert not names & {"script", "link", "iframe", "object", "base"}
    sources = [attrs[key] for _, attrs in found for key in ("src", "href", "poster", "data") if key in attrs]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in report.STYLE and "@import" not in report.STYLE


def test_links_lead_to_sections_and_every_class_has_a_style():
    elements = Elements(report.render_report("t", {"b": 1}, [Section("a", every_block("x")), Section("b", [])]))
    assert [a["href"] for a in elements.all("a")] == [f"#{s['id']}" for s in elements.all("section")]
    used = {name for _, attrs in elements.found for name in attrs.get("class", "").split()}
    assert {name for name in used if f".{name}" not in report.STYLE} <= {"l"}


def test_the_same_data_gives_the_same_file(tmp_path):
    for name in ("a.html", "b.html"):
        report.write_report(tmp_path / name, "t", {"x": 1.5}, [Section("s", every_block("y"))])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_text_without_a_utf8_form_is_written(tmp_path):
    report.write_report(tmp_path / "r.html", "t", {}, [Section("s", [Text("a\ud800b – é")])])
    assert "a&#55296;b – é" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_failed_write_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"r\.html: the disk is full"):
        report.write_report(path, "t", {}, [])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match=r"f/r\.html"):
        report.write_report(tmp_path / "f" / "r.html", "t", {}, [])


def test_cells_show_what_is_missing_or_not_finite():
    rows = [[None, math.nan, True], [129_551_488, -math.inf, False], [np.int64(1), np.float32(0.25), None]]
    cells = re.findall(r'<td class="(.)">([^<]*)</td>', document(Table(["a", "b", "c"], rows)))
    assert cells == [
        ("r", "–"),
        ("r", "nan"),
        ("l", "yes"),
        ("r", "129,551,488"),
        ("r", "-inf"),
        ("l", "no"),
        ("r", "1"),
        ("r", "0.25"),
        ("l", "–"),
    ]
    assert '<td class="c">x</td><td class="l">1</td>' in document(Table(["a", "b"], [["x", 1]], align="cl"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.02371, "0.02371"), (1234.56, "1235"), (1e-5, "1e-5"), (-12345.6, "-1.235e4"), (7, "7")],
)
def test_numbers_are_readable(value, shown):
    assert plots.format_number(value) == shown


@pytest.mark.parametrize(
    "make",
    [
        lambda: Table(["a", "b"], [[1]]),
        lambda: Table(["a"], [[1]], align="lr"),
        lambda: Table(["a"], [[1]], align="x"),
        lambda: Series("s", [0, 1], [0]),
        lambda: Series("s", [math.nan], [0]),
        lambda: BarPlot("b", ["a"], []),
        lambda: document(Image(MP4, "a video")),
        lambda: document(Video(PNG, "an image")),
        lambda: document("plain text"),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_media_keep_their_bytes():
    elements = Elements(document(Image(PNG, "i"), Video(MP4, "v", loop=False), Video(MP4, "v")))
    kind, _, data = elements.all("img")[0]["src"].partition(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", PNG)
    assert [("loop" in v, v["src"][:15]) for v in elements.all("video")] == [
        (False, "data:video/mp4;"),
        (True, "data:video/mp4;"),
    ]


@given(finite, st.floats(1e-12, 1e12))
def test_linear_ticks_are_round_distinct_and_within_range(low, span):
    high = low + max(span, abs(low) * 1e-9)
    ticks = plots.linear_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks)) and low <= ticks[0] and ticks[-1] <= high
    labels = plots.tick_labels(ticks)
    assert len(set(labels)) == len(ticks)


@given(st.floats(-12, 12), st.floats(0.01, 20))
def test_log_ticks_are_within_range(low, decades):
    low, high = 10.0**low, 10.0 ** (low + decades)
    ticks = plots.log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks)) and low <= ticks[0] and ticks[-1] <= high


def test_tick_labels_share_a_unit_when_they_can():
    assert plots.tick_labels([0.0, 5000.0, 10000.0]) == ["0", "5k", "10k"]
    assert plots.tick_labels([0.01, 1.0, 100.0, 1e4]) == ["0.01", "1", "100", "1e4"]
    assert plots.tick_labels([1.00001, 1.00002]) == ["1.00001", "1.00002"]


@given(
    st.lists(st.tuples(finite, st.none() | st.floats()), max_size=30),
    st.booleans(),
)
def test_lines_stay_inside_the_frame_and_every_missing_value_is_counted(points, log_y):
    series = Series("s", [x for x, _ in points], [y if y is None or abs(y) < 1e30 else math.nan for _, y in points])
    figure = plots.line_plot(LinePlot("t", "x", "y", [series], log_y=log_y))
    Elements(figure)
    line = re.search(r'<g class="line s0">(.*?)</g>', figure).group(1)
    corners = [tuple(map(float, corner)) for corner in re.findall(r"(-?[\d.]+) (-?[\d.]+)(?=[LMh\"])", line)]
    for x, y in corners:
        assert plots.LEFT <= x <= plots.WIDTH - plots.RIGHT and plots.TOP <= y <= plots.HEIGHT - plots.BOTTOM
    drawable = [y for y in series.y if y is not None and math.isfinite(y) and (y > 0 or not log_y)]
    assert len(corners) == len(drawable)
    assert ("are not drawn" in figure) == (len(drawable) < len(points))


def test_a_gap_breaks_the_line_and_a_lone_value_is_a_dot():
    figure = plots.line_plot(LinePlot("t", "x", "y", [Series("s", [0, 1, 2, 3, 4, 5], [1, 2, None, 3, math.inf, 5])]))
    lines, dots = re.findall(r' d="(M[^"HVv]+)"', figure.split('<g class="line')[1])
    assert lines.count("M") == 1 and dots.count("M") == 2
    assert "2 of 6 values are not drawn: not finite." in figure


def test_a_long_series_is_thinned_without_losing_its_spikes():
    values = [1.0] * 50_000
    values[12_345], values[-1] = 100.0, -3.0
    figure = plots.line_plot(LinePlot("t", "x", "y", [Series("s", range(50_000), values)]))
    line = re.search(r'<g class="line s0"><path d="([^"]*)"', figure).group(1)
    heights = [float(y) for y in re.findall(r" ([\d.]+)", line)]
    alone = plots.line_plot(LinePlot("t", "x", "y", [Series("s", [0, 12_345, 49_999], [1.0, 100.0, -3.0])]))
    expected = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", alone.split('class="line')[1])]
    assert len(heights) <= plots.MAX_POINTS
    assert (heights[0], min(heights), heights[-1]) == tuple(expected)


def test_bars_start_at_zero_on_either_side():
    figure = plots.bar_plot(BarPlot("t", ["a", "b", "c", "d"], [30.0, -10.0, None, math.nan], unit="dB"))
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", figure) == [("25.00", "75.00"), ("0.00", "25.00")]
    assert re.findall(r"<b>(.*?)</b>", figure) == ["30 dB", "-10 dB", "–", "nan"]
