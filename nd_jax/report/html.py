"""One HTML file a run: headings, tables, plots, commands, images and videos, from plain data.

The file holds everything it shows and no script. All text that is passed in is escaped; images and videos are bytes
that become data URIs, their kind read from the bytes. The same data gives the same file byte by byte: a date is data.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from pathlib import Path

from nd_jax.files import replacing
from nd_jax.report.plots import BarPlot, LinePlot, Series, bar_plot, format_number, line_plot
from nd_jax.report.style import STYLE

__all__ = [
    "BarPlot",
    "Block",
    "Cell",
    "Command",
    "Details",
    "Image",
    "LinePlot",
    "Section",
    "Series",
    "Table",
    "Text",
    "Video",
    "render_report",
    "write_report",
]

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines; single line breaks stay."""

    text: str


@dataclass(frozen=True)
class Command:
    """Text in monospace, as typed or printed: commands, configs, error messages."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; `align` has one letter for each column: l(eft), c(entre), r(ight).

    Without `align`, a column is right-aligned if its cells are numbers or None. Floats show four significant digits,
    ints thousands separators, None a dash: pass a string where another form is wanted.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str | None = None
    caption: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"table {self.caption!r} has {len(self.headers)} headers and a row of {len(row)}: {row}"
                )
        if self.align is not None and (len(self.align) != len(self.headers) or set(self.align) - set("lcr")):
            raise ValueError(f"align {self.align!r} is not {len(self.headers)} letters of l, c, r")


@dataclass(frozen=True)
class Image:
    """PNG, JPEG, GIF or WebP bytes; `description` is for those who do not see it."""

    data: bytes
    description: str
    caption: str = ""


@dataclass(frozen=True)
class Video:
    """MP4 or WebM bytes with controls; `loop` repeats it, as short clips need."""

    data: bytes
    description: str
    caption: str = ""
    loop: bool = True


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away behind one line."""

    summary: str
    blocks: "Sequence[Block]"


Block = Text | Command | Table | LinePlot | BarPlot | Image | Video | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


def write_report(path: Path, title: str, summary: Mapping[str, Cell], sections: Sequence[Section]) -> None:
    """Writes the report to `path`, through a temporary sibling that is renamed. `summary`: label -> value, shown first.

    Raises UserError if the file cannot be written, ValueError if an image or video is of no known kind.
    """
    path = Path(path)
    # A lone surrogate (possible in text from JSON) has no UTF-8 form; as a character reference it shows as U+FFFD.
    document = render_report(title, summary, sections).encode("utf-8", errors="xmlcharrefreplace")
    with replacing(path) as temporary:
        temporary.write_bytes(document)


def render_report(title: str, summary: Mapping[str, Cell], sections: Sequence[Section]) -> str:
    """The whole document as text; arguments as in `write_report`."""
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{_cell(v)}</dd></div>" for k, v in summary.items())
    links = "".join(f'<li><a href="#section-{i}">{escape(s.heading)}</a></li>' for i, s in enumerate(sections, 1))
    bodies = "".join(
        f'<section id="section-{i}"><h2>{escape(s.heading)}</h2>\n{_blocks(s.blocks)}</section>\n'
        for i, s in enumerate(sections, 1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Text that slipped through the escaping could still neither run nor fetch anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:; media-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>\n"
        + (f'<dl class="summary">{tiles}</dl>\n' if tiles else "")
        + (f'<nav aria-label="Sections"><ol>{links}</ol></nav>\n' if len(sections) > 1 else "")
        + f"</header>\n<main>\n{bodies}</main>\n</body>\n</html>\n"
    )


def _blocks(blocks: Sequence[Block]) -> str:
    return "".join(_block(block) + "\n" for block in blocks)


def _block(block: Block) -> str:
    match block:
        case Text(text):
            paragraphs = (part.strip() for part in text.split("\n\n"))
            return "".join(f"<p>{escape(part)}</p>" for part in paragraphs if part)
        case Command(text):
            return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        case Table():
            return _table(block)
        case LinePlot():
            return line_plot(block)
        case BarPlot():
            return bar_plot(block)
        case Image(data, description, caption):
            return _figure(f'<img src="{_data_uri(data, _IMAGES, description)}" alt="{escape(description)}">', caption)
        case Video(data, description, caption, loop):
            source = _data_uri(data, _VIDEOS, description)
            flags = "controls muted playsinline" + (" loop" if loop else "")
            return _figure(f'<video {flags} aria-label="{escape(description)}" src="{source}"></video>', caption)
        case Details(summary, blocks):
            return f"<details><summary>{escape(summary)}</summary>\n{_blocks(blocks)}</details>"
        case _:
            raise ValueError(f"a report has no block of type {type(block).__name__}")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}{_element('figcaption', caption)}</figure>"


def _element(tag: str, text: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>" if text else ""


def _table(table: Table) -> str:
    align = table.align or "".join("r" if _is_numeric(column) else "l" for column in _columns(table))

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{a}">{c}</{tag}>' for a, c in zip(align, cells, strict=True)) + "</tr>"

    head = row("th", [escape(h) for h in table.headers])
    body = "".join(row("td", [_cell(c) for c in cells]) for cells in table.rows)
    caption = _element("caption", table.caption)
    # The container scrolls, not the page; tabindex lets a keyboard scroll it.
    return f'<div class="scroll" tabindex="0"><table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _columns(table: Table) -> list[list[Cell]]:
    return [[row[i] for row in table.rows] for i in range(len(table.headers))]


def _is_numeric(column: Sequence[Cell]) -> bool:
    given = [cell for cell in column if cell is not None]
    return bool(given) and all(isinstance(cell, Real) and not isinstance(cell, bool) for cell in given)


def _cell(value: Cell) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(value) if isinstance(value, str) else format_number(value)


# (offset, first bytes at it, MIME type)
_IMAGES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
)
_VIDEOS = ((4, b"ftyp", "video/mp4"), (0, b"\x1a\x45\xdf\xa3", "video/webm"))


def _data_uri(data: bytes, kinds: Sequence[tuple[int, bytes, str]], description: str) -> str:
    for offset, magic, mime in kinds:
        if data[offset : offset + len(magic)] == magic:
            return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
    known = ", ".join(mime for _, _, mime in kinds)
    raise ValueError(f"{description!r} starts with {data[:12]!r}, which is none of {known}")
