"""The style, tables and figures of HTML pages."""

import html
from collections.abc import Sequence

# Wide tables and figures scroll in their own boxes; the names of rows stay in place.
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }
section { border-top: 1px solid #999; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-spacing: 0; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; background: #fff;
         text-align: right; white-space: nowrap; }
th { border-color: #1a1a1a; vertical-align: bottom; }
.words { text-align: left; }
tr > :first-child { position: sticky; left: 0; }
details td + td { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
img { display: block; max-width: min(100%, 50rem); }
@media (max-width: 40rem) { img { max-width: 38rem; } }
tr.best td { background: #d9ecd0; font-weight: 600; }
summary { font-weight: 600; cursor: pointer; }
"""


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    words: int = 1,
    marked: set[int] | frozenset[int] = frozenset(),
) -> str:
    """Returns a table.

    Args:
      header: titles of the columns.
      rows: rows with as many cells as `header`.
      caption: text above the table.
      words: number of columns, from the left, with words. The others have numbers, and
        empty ones are left out.
      marked: indices of the shaded rows.
    """
    kept = [
        column
        for column in range(len(header))
        if column < words or any(row[column] for row in rows)
    ]

    def cells(row: Sequence[str], tag: str) -> str:
        classes = (" class=words" * (column < words) for column in kept)
        return "".join(
            f"<{tag}{name}>{text(row[column])}</{tag}>"
            for name, column in zip(classes, kept)
        )

    body = "\n".join(
        f"<tr{' class=best' * (number in marked)}>{cells(row, 'td')}</tr>"
        for number, row in enumerate(rows)
    )
    return figure(
        f"<table>\n<thead><tr>{cells(header, 'th')}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>",
        caption,
    )


def figure(content: str, caption: str) -> str:
    """Returns HTML with a caption, in a box that scrolls (by keys too) if narrow."""
    label = text(caption)
    return (
        f"<figure>\n<figcaption>{label}</figcaption>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n'
        f"{content}\n</div>\n</figure>"
    )


def text(plain: str) -> str:
    """Returns text as HTML."""
    return html.escape(plain)
