"""The pieces of a self-contained HTML page: style, sections, tables, embedded images."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = """
:root{--ink:#1d2630;--soft:#5c6873;--line:#e3e6ea;--page:#f4f5f7;--accent:#2563a8}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0}
h2{font-size:18px;margin:0 0 10px}
h3{font-size:14px;margin:18px 0 6px;color:var(--soft)}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:18px 22px;margin-top:18px}
p{margin:6px 0;max-width:110ch;color:var(--soft);font-size:13.5px}
p.note{border-left:3px solid #d99a1c;background:#fdf7ea;color:var(--ink);padding:8px 12px;margin:12px 0}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:8px 22px;margin:0}
dt{color:var(--soft);font-size:12.5px}
dd{margin:0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0 16px}
.tile{border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:170px;color:var(--soft);
 font-size:12.5px;font-variant-numeric:tabular-nums}
.tile b{display:block;font-size:25px;line-height:1.25;color:var(--accent)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;border-bottom:1px solid var(--line);padding:5px 10px;white-space:nowrap}
th{color:var(--soft);font-weight:600;font-size:12.5px;border-bottom-width:2px}
th:first-child,td:first-child{text-align:left}
tr:hover td{background:#f8fafc}
figure{margin:14px 0 18px}
figcaption{margin-bottom:6px}
img{max-width:100%;display:block}
figure img{border-radius:6px;background:#000}
pre{background:#f8f9fa;border:1px solid var(--line);border-radius:6px;padding:12px;overflow-x:auto;
 font-size:12.5px}
details{margin-top:12px}
summary{cursor:pointer;font-weight:600}
@media print{body{background:#fff}section{break-inside:avoid;border:0;padding:8px 0}}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page; the title is plain text, the sections are markup."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{text(title)}</h1>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def text(value: Any) -> str:
    """Plain text as markup."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n" + "\n".join(parts) + "</section>"


def para(plain: str) -> str:
    return f"<p>{text(plain)}</p>"


def note(plain: str) -> str:
    return f'<p class="note">{text(plain)}</p>'


def folded(title: str, *parts: str) -> str:
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>"


def facts(items: dict[str, Any]) -> str:
    """Names over values, side by side."""
    pairs = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items.items())
    return f"<dl>{''.join(pairs)}</dl>"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Cells are plain text."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def image(data: bytes, kind: str, alt: str) -> str:
    """`kind` is the media type after image/."""
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
