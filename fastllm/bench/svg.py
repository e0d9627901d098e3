"""Charts as SVG text: the page that all of them stand on, and its colors.

A page has a background of its own, so that it reads the same on a light and on a dark site.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, MUTED, FAINT, PAPER = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
BLUE, AMBER, RED, GREEN = "#2f81f7", "#bf8700", "#cf222e", "#1a7f37"
PURPLE, ROSE, GRAY = "#8250df", "#ff8182", "#8c959f"


def page(width: int, height: int, title: str, below: str, parts: Sequence[str]) -> str:
    """A whole file: a title, a line below it, and the parts; these begin at about y = 56."""
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="{INK}">',
                f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
                f'<text x="16" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
                f'<text x="16" y="42" fill="{MUTED}">{escape(below)}</text>',
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )
