"""One HTML file that shows what would be trained. It needs no network and no server; data in it is only ever text."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import math
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from adaptax.config import UserError

TEMPLATE = Path(__file__).parent / "assets" / "preview.html"
KINDS = ("trained", "context", "padding")

# What a reader does not see, or what turns the text around it: controls, lone surrogates, bidi marks and overrides,
# zero-width characters, tags. Joiners (U+200C, U+200D) stay: emoji and Persian are written with them.
_HIDDEN = re.compile(
    "[\n\t\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
_SOME_LINES = re.compile(r"(?s)(?:[^\n]*+\n){50}|.+")


@dataclass(frozen=True)
class Span:
    """Adjacent tokens of one kind, as text."""

    text: str
    kind: str  # one of KINDS


@dataclass(frozen=True)
class Part:
    """A document in a sequence. The padding after the last one is a part without a place."""

    place: str  # where it comes from: "chats.jsonl row 7"
    spans: tuple[Span, ...]
    num_tokens: int
    num_trained: int

    @property
    def is_padding(self) -> bool:
        """Whether this is what fills the sequence rather than a document."""
        return not self.place and all(span.kind == "padding" for span in self.spans)


@dataclass(frozen=True)
class Sample:
    """One sequence as the model would get it: documents side by side, then padding."""

    title: str  # "sequence 3"
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Histogram:
    """How long rows are, in tokens: ``counts[i]`` rows have at least ``edges[i]`` and less than ``edges[i + 1]``."""

    edges: tuple[int, ...]  # increasing, one more than counts
    counts: tuple[int, ...]


def check_page(path: Path) -> Path:
    """The file that a page is to be written to; raises UserError where that will not do."""
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise UserError(f"{path} is a folder; name a file in it, such as {path / 'preview.html'}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"{path} is not a regular file, so it is not replaced")
    if not os.path.isdir(target.parent):
        raise UserError(f"{path} cannot be written: there is no folder {target.parent}")
    return target


def write_page(
    path: Path,
    title: str,
    command: str,
    facts: Sequence[tuple[str, str]],
    warnings: Sequence[str],
    histogram: Histogram | None,
    samples: Sequence[Sample],
) -> None:
    """Writes what ``render_page`` returns, whole or not at all; what stood there before is replaced.

    Raises:
      UserError: the path cannot be written.
    """
    target = check_page(path)
    page = render_page(title, command, facts, warnings, histogram, samples).encode()
    partial = target.with_name(f".preview-{secrets.token_hex(6)}.partial")
    try:
        partial.write_bytes(page)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def render_page(
    title: str,
    command: str,
    facts: Sequence[tuple[str, str]],
    warnings: Sequence[str],
    histogram: Histogram | None,
    samples: Sequence[Sample],
) -> str:
    """The whole page.

    Args:
      title: the heading.
      command: what made the page, shown below the heading.
      facts: (name, value) pairs, a table row each.
      warnings: shown in a box; none, no box.
      histogram: of the rows' lengths; None, no picture.
      samples: a card each, in this order.

    Returns:
      HTML that UTF-8 can hold; its policy lets no style and no script run but its own, should markup slip through.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    cards = "\n".join(_render_sample(sample, i) for i, sample in enumerate(samples))
    return Template(template).substitute(
        style_hash=_hash_of(template, "style"),
        script_hash=_hash_of(template, "script"),
        title=_plain(title),
        command=_plain(command),
        facts="\n".join(f"<tr><th scope=row>{_plain(k)}</th><td><bdi>{_plain(v)}</bdi></td></tr>" for k, v in facts),
        warnings=_render_warnings(warnings) if warnings else "",
        histogram=_render_histogram(histogram) if histogram and any(histogram.counts) else "",
        samples=cards or '<p class="nothing">There is no sequence to show.</p>',
        num_samples=_count(len(samples), "sequence"),
    )


def _hash_of(template: str, tag: str) -> str:
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


def visible(text: str) -> str:
    """The text with characters that are not seen, or that turn what is, as escapes; newlines and tabs stay."""
    return _HIDDEN.sub(lambda m: m[0] if m[0] in "\n\t" else m[0].encode("unicode_escape").decode(), text)


def _plain(text: str) -> str:
    return html.escape(visible(text))


def _marked(text: str) -> str:
    """Text of a document: escaped; hidden characters, newlines and tabs are elements that the style shows."""

    def mark(match: re.Match[str]) -> str:
        kind = {"\n": "n", "\t": "t"}.get(match[0], f'c title="U+{ord(match[0]):04X}"')
        return f"<i class={kind}>{visible(match[0])}</i>"

    return _HIDDEN.sub(mark, html.escape(text))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _render_warnings(warnings: Sequence[str]) -> str:
    items = "\n".join(f"<li><bdi>{_plain(warning)}</bdi></li>" for warning in warnings)
    return f"""<section class=warnings aria-labelledby=warned><h2 id=warned>{_count(len(warnings), "warning")}</h2>
<ul>{items}</ul></section>"""


def _render_histogram(histogram: Histogram) -> str:
    """Bars in percent of the width, so that the labels keep their size on a narrow screen."""
    edges, counts = histogram.edges, histogram.counts
    assert len(edges) == len(counts) + 1 > 1, "a histogram has one more edge than counts"
    spans = [f"{a:,}" if b - a == 1 else f"{a:,} to {b - 1:,}" for a, b in zip(edges, edges[1:], strict=False)]
    step = _nice_step(max(counts))
    top = max(step, math.ceil(max(counts) / step) * step)
    shapes = []
    for value in range(0, top + 1, step):
        y = f"{100 - 100 * value / top:.2f}%"
        shapes.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        shapes.append(f'<text class="y" x="-8" y="{y}" dy="4">{value:,}</text>')
    width = 100 / len(counts)
    for i, count in enumerate(counts):
        high = max(100 * count / top, 1.5 if count else 0)  # one long row in a thousand is seen too
        box = f'x="{(i + 0.06) * width:.3f}%" y="{100 - high:.2f}%" width="{0.88 * width:.3f}%" height="{high:.2f}%"'
        shapes.append(f"<rect {box}><title>{spans[i]} tokens: {_count(count, 'row')}</title></rect>")
    stride = math.ceil(len(counts) / 5)
    for i in [*range(0, len(counts) - stride // 2, stride), len(counts)]:
        shapes.append(f'<text x="{i * width:.3f}%" y="100%" dy="18">{edges[i]:,}</text>')
    most = max(range(len(counts)), key=counts.__getitem__)
    about = f"{_count(sum(counts), 'row')}; most often {spans[most]} tokens ({_count(counts[most], 'row')})"
    rows = "".join(f"<tr><td>{s}</td><td>{c:,}</td></tr>" for s, c in zip(spans, counts, strict=True))
    return f"""<figure class="lengths"><figcaption>Length of the rows <small>{about}</small></figcaption>
<svg role="img" aria-labelledby="lengths-title"><title id="lengths-title">Rows by length in tokens: {about}</title>
{"".join(shapes)}
<text x="50%" y="100%" dy="38">tokens in a row</text><text class="y" x="-8" y="0" dy="-14">rows</text></svg>
<details><summary>The same as a table</summary>
<table><thead><tr><th scope=col>tokens</th><th scope=col>rows</th></tr></thead><tbody>{rows}</tbody></table></details>
</figure>"""


def _nice_step(largest: int) -> int:
    """1, 2 or 5 times a power of ten, so that at most five steps reach the largest count."""
    least = max(1.0, largest / 4)
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _render_sample(sample: Sample, place: int) -> str:
    total = sum(part.num_tokens for part in sample.parts)
    trained = sum(part.num_trained for part in sample.parts)
    padding = sum(part.num_tokens for part in sample.parts if part.is_padding)
    documents = sum(not part.is_padding for part in sample.parts)
    share = f" ({trained / total:.0%})" if total else ""
    learned, rest = 100 * trained / max(total, 1), 100 * (total - trained - padding) / max(total, 1)
    return f"""<article class="card" aria-labelledby="sample-{place}">
<header><h3 id="sample-{place}"><bdi>{_plain(sample.title)}</bdi></h3>
<p>{_count(documents, "document")} · {_count(total, "token")} · {trained:,} trained{share}</p>
<svg class="share" aria-hidden="true"><rect class="trained" width="{learned:.2f}%" height="100%"/>
<rect class="context" x="{learned:.2f}%" width="{rest:.2f}%" height="100%"/></svg></header>
{"".join(map(_render_part, sample.parts))}</article>"""


def _render_part(part: Part) -> str:
    if part.is_padding:
        return f'<p class="filler">· {_count(part.num_tokens, "padding token")}</p>' if part.num_tokens else ""
    assert all(span.kind in KINDS for span in part.spans), "an unknown kind of span"
    place = _plain(part.place or "unknown place")
    may_scroll = sum(len(span.text) / 40 + span.text.count("\n") for span in part.spans) > 18
    focus = f' tabindex=0 role=region aria-label="Text of {place}"' if may_scroll else ""
    trained = f"{part.num_trained:,} trained" if part.num_trained else "<strong>nothing trained</strong>"
    return f"""<section class="part"><p class="where"><bdi class="place">{place}</bdi>
<span class="counts">{_count(part.num_tokens, "token")} · {trained}</span></p>
<div class="text" lang=""{focus}>{_render_spans(part.spans)}</div></section>"""


def _render_spans(spans: Sequence[Span]) -> str:
    """Blocks of some 50 lines, which look like one: a browser takes half a minute to lay out 50,000 lines in one."""
    blocks = [""]
    for span in spans:
        for lines in _SOME_LINES.findall(span.text):
            blocks[-1] += f'<span class="{span.kind}">{_marked(lines)}</span>'
            if lines[-1] == "\n" and len(blocks[-1]) > 2000:
                blocks.append("")
    return "".join(f'<div class="block">{block}</div>' for block in blocks if block)
