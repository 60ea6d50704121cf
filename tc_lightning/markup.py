"""HTML of pictures, scores and messages for the page; whatever a user wrote is escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tc_lightning.pixels import to_uint8
from tc_lightning.playground import Picture
from tc_lightning.ratings import QUESTIONS, Pair, WinRate

STYLE = """
.tc-figures {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(150px, 100%), 1fr)); gap: 12px; max-width: 1100px}
.tc-figures figure, .tc-pair figure {margin: 0; padding: 8px; border: 1px solid var(--border-color-primary); border-radius: 8px}
.tc-figures img, .tc-pair img {width: 100%; image-rendering: pixelated; border-radius: 4px; display: block}
.tc-figures figcaption {font-weight: 600; margin: 6px 0 2px; overflow-wrap: anywhere}
.tc-figures dl {margin: 0; font-size: .85em} .tc-figures dl div {display: flex; flex-wrap: wrap; gap: 0 8px}
.tc-figures dt {overflow-wrap: anywhere} .tc-figures dd {margin: 0 0 0 auto; white-space: nowrap}
.tc-figures .up {color: #1a7f37} .tc-figures .down {color: #b3261e}
.dark .tc-figures .up {color: #5fd07f} .dark .tc-figures .down {color: #ff8a80}
.tc-figures a, .tc-links a {font-size: .85em; text-decoration: underline}
.tc-message {padding: 8px 12px; border-radius: 8px; border-left: 4px solid #4c6a92; background: var(--background-fill-secondary)}
.tc-message.error {border-left-color: #b3261e; font-weight: 600} .tc-message.done {border-left-color: #1a7f37}
.tc-pair {display: grid; grid-template-columns: 1fr 1fr; gap: 16px; max-width: 760px}
.tc-pair figcaption {text-align: center; font-weight: 600; margin-top: 6px}
.tc-question {font-size: 1.15em; font-weight: 600; margin: 8px 0} .tc-prompt {margin: 4px 0 12px; overflow-wrap: anywhere}
.tc-table {border-collapse: collapse; margin-top: 8px} .tc-table td, .tc-table th {border: 1px solid var(--border-color-primary);
 padding: 4px 10px; text-align: right} .tc-table th:first-child, .tc-table td:first-child {text-align: left}
.tc-scroll {overflow-x: auto} #history img {image-rendering: pixelated} #history .grid-wrap {min-height: 0; padding-top: 30px}
"""


def message(text: str, kind: str = "") -> str:
    """A line that screen readers speak; `kind` is "", "done" or "error"."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="tc-message {kind}" role="{role}">{escape(text)}</div>'


def figures(pictures: Sequence[Picture], prompt: str, settings: Mapping[str, Any] | None = None) -> str:
    """Pictures side by side with their scores, and how far those are from the first picture's; links that save them.

    Args:
        settings: offered as a file beside the pictures.
    """
    shown = "".join(_figure(picture, pictures[0], prompt) for picture in pictures)
    links = ""
    if settings is not None:
        data = base64.b64encode(json.dumps(settings, indent=1, ensure_ascii=False).encode()).decode()
        links = (
            f'<p class="tc-links"><a download="settings.json" href="data:application/json;base64,{data}">Save the settings</a></p>'
        )
    return f'<div class="tc-figures">{shown}</div>{links}'


def _figure(picture: Picture, first: Picture, prompt: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    label = escape(picture.label)
    file = "".join(c if c.isalnum() else "_" for c in picture.label)
    image = f'<img src="{source}" alt="{label}: {escape(prompt, quote=True)}">'
    scores = "".join(_score(name, value, first.scores.get(name), picture is first) for name, value in picture.scores.items())
    link = f'<a download="{file}.png" href="{source}" aria-label="Save the picture {label}">Save</a>'
    return f"<figure>{image}<figcaption>{label}</figcaption><dl>{scores}</dl>{link}</figure>"


def _score(name: str, value: float, first: float | None, is_first: bool) -> str:
    apart = "" if is_first or first is None else f"{value - first:+.2f}"
    kind = "" if not apart else "up" if value - first > 0.005 else "down" if value - first < -0.005 else ""
    difference = f' <span class="{kind}">{apart}</span>' if apart else ""
    return f"<div><dt>{escape(name)}</dt><dd>{value:.2f}{difference}</dd></div>"


def png(picture: Picture) -> bytes:
    """The image as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(to_uint8(picture.image[None])[0]).save(buffer, "PNG")
    return buffer.getvalue()


def question(pair: Pair, asked: str, token: str, position: int, of: int) -> str:
    """Two pictures without their names and what is asked of them; `token` travels back with the answer."""
    sides = "".join(_side(file, name) for file, name in ((pair.left_file, "left"), (pair.right_file, "right")))
    head = f'<div class="tc-question" role="status">{escape(QUESTIONS[asked])}</div>'
    prompt = f'<div class="tc-prompt">Prompt: {escape(pair.prompt)}</div>'
    return f'<div data-token="{escape(token)}">{head}{prompt}<div class="tc-pair">{sides}</div><p>{position + 1} of {of}</p></div>'


def _side(file: Path, name: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{name} picture"><figcaption>{name}</figcaption></figure>'


def win_table(rates: Sequence[WinRate]) -> str:
    """The table of win rates."""
    if not rates:
        return message("No answer yet.")
    head = "".join(f"<th>{name}</th>" for name in ("model", "against", "question", "win rate, 95 %", "wins", "ties", "losses"))
    rows = ""
    for row in rates:
        rate = f"{row.rate.mean:.1%} [{row.rate.low:.1%}, {row.rate.high:.1%}]"
        cells = (row.model, row.base, row.question, rate, row.wins, row.ties, row.losses)
        rows += "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
    return f'<div class="tc-scroll"><table class="tc-table"><tr>{head}</tr>{rows}</table></div>'


def thumbnail(picture: Picture, size: int = 96) -> Image.Image:
    """A small image for the history."""
    image = Image.fromarray(to_uint8(picture.image[None])[0])
    return image.resize((size, size), Image.Resampling.NEAREST if image.width < size else Image.Resampling.BICUBIC)
