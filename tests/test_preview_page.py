"""The preview page: whatever stands in the data is text, and a real browser shows and searches it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import resource
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adaptax.config import UserError
from adaptax.preview_page import Histogram, Part, Sample, Span, render_page, visible, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=2000 --dump-dom"
)
RAN = "document.title='ran'"
HOSTILE = [
    f"<script>{RAN}</script>",
    f"</script><script>{RAN}</script>",
    f"</style></title></textarea><script>{RAN}</script>",
    f"<img src=x onerror=\"{RAN}\"><svg onload='{RAN}'>",
    f"\" autofocus onfocus=\"{RAN}\" x='' onclick='{RAN}'",
    f"<a href=\"javascript:{RAN}\">here</a><iframe src='javascript:top.{RAN}'></iframe>",
    "<!-- --!><![CDATA[ ]]><plaintext><base href=//example.com><meta http-equiv=refresh content=0>",
    "$title ${script_hash} $$ $ ${ %s {0} &lt; &amp;lt; &#60; &nosemicolon",
]


class Node(HTMLParser):
    """An element, and the parser that makes a tree of a page."""

    VOID = ("meta", "input", "img")

    def __init__(self, tag: str = "", attrs: dict[str, str | None] | None = None) -> None:
        super().__init__()
        self.tag, self.attrs = tag, attrs or {}
        self.children: list[Node | str] = []
        self.open = [self]

    @classmethod
    def parse(cls, page: str) -> Node:
        root = cls()
        root.feed(page)
        root.close()
        assert [node.tag for node in root.open] == [""], "an element is not closed"
        return root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop().tag == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, selector: str) -> list[Node]:
        """Elements by "tag", ".class" or "#id"."""
        kind, name = selector[0], selector[1:]
        if kind == "#":
            return [node for node in self.walk() if node.attrs.get("id") == name]
        if kind == ".":
            return [node for node in self.walk() if name in (node.attrs.get("class") or "").split()]
        return [node for node in self.walk() if node.tag == selector]

    def one(self, selector: str) -> Node:
        (node,) = self.all(selector)
        return node

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


def make_part(place: str, *spans: tuple[str, str], num_tokens: int = 20, num_trained: int = 8) -> Part:
    return Part(place, tuple(Span(text, kind) for text, kind in spans), num_tokens, num_trained)


def make_chat(row: int, user: str, model: str) -> Part:
    head = f"<bos><start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n"
    return make_part(f"chats.jsonl row {row}", (head, "context"), (f"{model}<end_of_turn>", "trained"))


PADDING = make_part("", ("<pad>" * 37, "padding"), num_tokens=37, num_trained=0)
LAMP = Sample("sequence 1", (make_chat(7, "Where is my lamp?", "It has left."), make_chat(9, "Hello", "Hi."), PADDING))
SHOP = Sample("sequence 2", (make_chat(12, "Is the shop open?", "From\t10\n\nto 4."),))
HISTOGRAM = Histogram((0, 64, 128, 192, 193), (3, 1204, 0, 1))


def render(**changes: Any) -> str:
    values = {
        "title": "What would be trained",
        "command": "adaptax preview data.train=chats.jsonl",
        "facts": [("sequences", "312"), ("trained tokens", "51%")],
        "warnings": ["7 rows are cut", "3 rows occur twice"],
        "histogram": HISTOGRAM,
        "samples": [LAMP, SHOP],
    }
    return render_page(**(values | changes))


def everywhere(text: str) -> str:
    """A page with this text in every place that takes one."""
    part = make_part(text, (text, "context"), (text, "trained"), ("long " * 200, "context"))
    return render(title=text, command=text, facts=[(text, text)], warnings=[text], samples=[Sample(text, (part,))])


def test_a_page_tells_facts_warnings_lengths_and_samples() -> None:
    page = Node.parse(render())
    assert page.one("h1").text == page.one("head").one("title").text == "What would be trained"
    assert page.all("caption")[0].text == "What would be trained"
    facts = page.all("table")[0]
    assert [(r.one("th").text, r.one("td").text) for r in facts.all("tr")] == [
        ("sequences", "312"),
        ("trained tokens", "51%"),
    ]
    assert page.one(".warnings").one("h2").text == "2 warnings"
    assert [item.text for item in page.one(".warnings").all("li")] == ["7 rows are cut", "3 rows occur twice"]
    first, second = page.all(".card")
    assert [place.text for place in first.all(".place")] == ["chats.jsonl row 7", "chats.jsonl row 9"]
    assert "2 documents · 77 tokens · 16 trained (21%)" in first.text
    assert first.one(".filler").text == "· 37 padding tokens"
    assert "<pad>" not in first.text
    assert [c.text for c in second.all(".counts")] == ["20 tokens · 8 trained"]
    assert second.one(".text").text == "".join(s.text for s in SHOP.parts[0].spans)
    assert [span.text for span in second.one(".text").all(".trained")] == ["From\t10\n\nto 4.<end_of_turn>"]


def test_what_there_is_none_of_is_left_out() -> None:
    page = Node.parse(render(facts=[], warnings=[], histogram=None, samples=[]))
    assert not page.all(".warnings")
    assert not page.all("figure")
    assert not page.all(".card")
    assert page.one("#found").text == "0 sequences"
    assert "There is no sequence to show." in page.text
    assert not Node.parse(render(histogram=Histogram((0, 8), (0,)))).all("figure")
    assert Node.parse(render(samples=[LAMP])).one("#found").text == "1 sequence"
    untrained = Sample("s", (make_part("a", ("text", "context"), num_trained=0),))
    assert Node.parse(render(samples=[untrained])).one("strong").text == "nothing trained"


def test_the_picture_of_lengths_can_be_read_without_seeing_it() -> None:
    figure = Node.parse(render()).one("figure")
    about = "1,208 rows; most often 64 to 127 tokens (1,204 rows)"
    assert figure.one("#lengths-title").text == f"Rows by length in tokens: {about}"
    assert figure.one("svg").attrs["aria-labelledby"] == "lengths-title"
    assert [[cell.text for cell in row.all("td")] for row in figure.one("tbody").all("tr")] == [
        ["0 to 63", "3"],
        ["64 to 127", "1,204"],
        ["128 to 191", "0"],
        ["192", "1"],
    ]
    bars = figure.all("rect")
    assert [bar.text for bar in bars][2:] == ["128 to 191 tokens: 0 rows", "192 tokens: 1 row"]
    heights = [float(str(bar.attrs["height"]).rstrip("%")) for bar in bars]
    assert heights[1] == max(heights) <= 100
    assert heights[2] == 0
    assert heights[3] > 1, "one long row is seen beside a thousand"
    labels = [label.text for label in figure.all("text")]
    assert labels == ["0", "500", "1,000", "1,500", "0", "64", "128", "192", "193", "tokens in a row", "rows"]


@pytest.mark.parametrize("num_bins", range(1, 60))
def test_labels_of_the_lengths_do_not_crowd(num_bins: int) -> None:
    histogram = Histogram(tuple(range(0, 32 * num_bins + 1, 32)), tuple(range(num_bins - 1)) + (10**num_bins,))
    labels = [t for t in Node.parse(render(histogram=histogram)).one("figure").all("text") if t.attrs.get("dy") == "18"]
    places = [float(str(label.attrs["x"]).rstrip("%")) for label in labels]
    assert places[0] == 0
    assert places[-1] == 100
    assert all(b - a >= 10 for a, b in zip(places, places[1:], strict=False))


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_data_is_text(text: str) -> None:
    def elements(page: str) -> list[tuple[str, list[str]]]:
        return [(node.tag, sorted(node.attrs)) for node in Node.parse(page).walk()]

    assert elements(everywhere(text)) == elements(everywhere("plain"))
    page = Node.parse(everywhere(text))
    (card,) = page.all(".card")
    cells = [page.one("h1"), page.one("code"), page.all("th")[0], page.all("td")[0]]
    for node in (
        *cells,
        page.one("head").one("title"),
        page.one(".warnings").one("li"),
        card.one("h3"),
        card.one(".place"),
    ):
        assert node.text == text
    assert card.one(".text").text == text + text + "long " * 200
    assert card.one(".text").attrs["aria-label"] == f"Text of {text}"


def test_hidden_characters_are_shown_and_the_page_is_utf_8() -> None:
    directions = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    hidden = [
        char
        for char in map(chr, range(0x110000))
        if char not in "\t\n"
        and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in directions)
    ]
    hidden += list("\u200b\u200e\u200f\u061c\u2060\ufeff\xad\U000e0041")
    text = "".join(hidden)
    page = everywhere(text)
    page.encode()
    assert not set(hidden) & set(page)
    node = Node.parse(page).one(".text").all(".context")[0]
    assert node.text == visible(text) == text.encode("unicode_escape").decode()
    assert [mark.attrs["title"] for mark in node.all(".c")] == [f"U+{ord(char):04X}" for char in hidden]


def test_whitespace_joiners_and_scripts_are_left_as_they_are() -> None:
    text = "\n\n  two  \t\n👩\u200d👩\u200d👧 می\u200cخواهم שלום 営業 e\u0301 \xa0\n"
    node = Node.parse(everywhere(text)).one(".text").all(".context")[0]
    assert node.text == visible(text) == text
    assert len(node.all(".n")) == 4
    assert len(node.all(".t")) == 1


def test_long_text_is_cut_into_blocks_at_newlines_alone() -> None:
    spans = [("a line\n" * 1000, "context"), ("x" * 1_000_000, "trained"), ("\n" * 120 + "end", "context")]
    node = Node.parse(render(samples=[Sample("s", (make_part("a", *spans),))])).one(".text")
    assert node.text == "".join(text for text, _ in spans)
    blocks = node.all(".block")
    assert len(blocks) > 10
    assert all(block.text.endswith("\n") for block in blocks[:-1])
    assert node.attrs["tabindex"] == "0"


def test_the_policy_names_the_style_and_the_script_and_nothing_is_loaded() -> None:
    page = render()
    tree = Node.parse(page)
    policy = next(m.attrs["content"] for m in tree.all("meta") if m.attrs.get("http-equiv"))
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(tree.one(tag).text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    assert not {"src", "href", "style", "srcset", "action"} & {name for node in tree.walk() for name in node.attrs}
    assert not re.search(r"https?:|url\(|@import", page)


def test_every_input_has_a_label_and_every_reference_a_target() -> None:
    tree = Node.parse(render())
    ids = [node.attrs["id"] for node in tree.walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    names = ("for", "aria-labelledby", "aria-describedby")
    assert {node.attrs[name] for node in tree.walk() for name in names if name in node.attrs} <= set(ids)
    assert {node.attrs["id"] for node in tree.all("input")} == {node.attrs["for"] for node in tree.all("label")}


def write(path: Path, title: str = "new") -> None:
    write_page(path, title, "adaptax preview", [], [], None, [LAMP])


def test_a_page_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    (tmp_path / "link.html").symlink_to(path)
    write(tmp_path / "link.html")
    assert path.read_bytes().decode() == render_page("new", "adaptax preview", [], [], None, [LAMP])
    assert (tmp_path / "link.html").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.html", "page.html"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_page_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"page\.html cannot be written: File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_page_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        ".": "is a folder; name a file in it, such as",
        "no/page.html": "cannot be written: there is no folder",
        "file/page.html": "cannot be written: there is no folder",
        "pipe": "is not a regular file, so it is not replaced",
        "a" * 300: "cannot be written: File name too long",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as caught:
            write(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} {message}")
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        write(tmp_path / "page.html")


def browse(page: str, folder: Path, fragment: str = "") -> tuple[Node, str, list[str]]:
    """(document, its title, console lines) after Chromium opened a page from a file, without a network."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    tree = Node.parse(done.stdout.decode())
    return (
        tree,
        tree.one("head").one("title").text,
        [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line],
    )


def shown(tree: Node) -> list[str]:
    return [card.one("h3").text for card in tree.all(".card") if "hidden" not in card.attrs]


@in_chromium
def test_hostile_data_is_read_and_does_not_run(tmp_path: Path) -> None:
    hostile = [Sample(text, (make_part(text, (text, "trained")),)) for text in HOSTILE]
    facts, warnings = [(text, text) for text in HOSTILE], [*HOSTILE, "\x00 \ud800 \u202e"]
    page = render(facts=facts, warnings=warnings, samples=[*hostile, LAMP, SHOP])
    tree, title, console = browse(page, tmp_path)
    assert title == "What would be trained"
    assert console == []
    assert [row.one("td").text for row in tree.all("table")[0].all("tr")] == HOSTILE
    assert [item.text for item in tree.one(".warnings").all("li")] == [*HOSTILE, r"\x00 \ud800 \u202e"]
    assert [text.text for text in tree.all(".text")][: len(HOSTILE)] == HOSTILE
    assert shown(tree) == [*HOSTILE, "sequence 1", "sequence 2"]
    assert "hidden" not in tree.one(".bar").attrs
    assert tree.one("#found").text == f"{len(HOSTILE) + 2} sequences"


@in_chromium
def test_search_in_the_address_filters_counts_and_marks(tmp_path: Path) -> None:
    tree, _, console = browse(render(), tmp_path, "#q=%20MODEL%20it%20Has")
    assert console == []
    assert shown(tree) == ["sequence 1"]
    assert tree.one("#found").text == "1 of 2 sequences · 1 hit"
    assert [mark.text for mark in tree.all("mark")] == ["model", "\n", "It has"], "over a newline and two kinds"
    assert [text.text for text in tree.all(".text")] == [text.text for text in Node.parse(render()).all(".text")]


@in_chromium
def test_a_megabyte_is_searched_and_places_are_too(tmp_path: Path) -> None:
    lines = make_part("needle.jsonl row 1", ("The quick brown fox.\n" * 50_000, "context"))
    letters = make_part("b", ("x" * 200_000 + "Needle.*(" * 3000, "trained"))
    tree, _, console = browse(
        render(samples=[Sample("lines", (lines,)), Sample("letters", (letters,)), SHOP]), tmp_path, "#q=needle"
    )
    assert console == []
    assert shown(tree) == ["lines", "letters"]
    assert tree.one("#found").text == "2 of 3 sequences · 3,001 hits, the first 2,000 marked"
    assert len(tree.all("mark")) == 2000


@in_chromium
def test_markup_that_slipped_through_would_not_run(tmp_path: Path) -> None:
    """Also shows that the tests above would hear of it."""
    slipped = f"<script>{RAN}</script><img src=x onerror=\"{RAN}\"/><p style='color: red'>a</p>"
    _, title, console = browse(render().replace("</main>", f"{slipped}</main>"), tmp_path)
    assert title == "What would be trained"
    assert len(console) >= 3
    assert all("Content Security Policy" in line for line in console)
