"""The picture of `bruno-ray bench`, an SVG by hand, and what is said of two of them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, BAR, GAP = 760, 270, 18, 8
INK, PALE, MAIN, OTHER = "#1f2937", "#e5e7eb", "#0f766e", "#c2410c"


def bench_svg(result: Mapping[str, Any]) -> str:
    """Trials per hour by trials at once, with the limit behind each bar, and the seconds of each phase."""
    rows = result["rows"]
    limits = [3600 * row["trials"] / row["limit_seconds"] for row in rows]
    bars = [
        (f"{row['trials']} at once", row["trials_per_hour"], limit, f"{row['trials_per_hour']:.0f}")
        for row, limit in zip(rows, limits)
    ]
    phases = result["phases"]["seconds"]
    second = [(name, seconds, 0.0, f"{seconds:.3g} s") for name, seconds in phases.items()]
    parts, y = _panel(f"trials per hour (pale: the limit); {result['machine']}", bars, 24, MAIN)
    more, y = _panel(f"where the time of {result['phases']['trials']} at once goes", second, y + 28, OTHER)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" font-family="system-ui, sans-serif"'
        f' font-size="13" fill="{INK}">\n' + "\n".join([*parts, *more]) + "\n</svg>\n"
    )


def _panel(title: str, bars: Sequence[tuple[str, float, float, str]], y: float, colour: str) -> tuple[list[str], float]:
    """Elements of horizontal bars (name, value, pale value behind it, text), and where the next panel may begin."""
    parts = [f'<text x="8" y="{y}" font-weight="600">{escape(title)}</text>']
    longest = max(max(value, behind) for _, value, behind, _ in bars) or 1.0
    scale = (WIDTH - LEFT - 90) / longest
    for name, value, behind, text in bars:
        y += BAR + GAP
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>')
        for length, fill in ((behind, PALE), (value, colour)):
            parts.append(
                f'<rect x="{LEFT}" y="{y - BAR + 4}" width="{length * scale:.1f}" height="{BAR}" fill="{fill}"/>'
            )
        parts.append(f'<text x="{LEFT + max(value, behind) * scale + 6:.1f}" y="{y}">{escape(text)}</text>')
    return parts, y + BAR


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines: trials per hour then and now at each number of trials at once that both have."""
    lines = [f"then: {old['date']}, {old['machine']}"] if old["machine"] != new["machine"] else []
    if old["model"] != new["model"]:
        lines.append(f"then another model: {old['model']}")
    before = {row["trials"]: row["trials_per_hour"] for row in old["rows"]}
    for row in new["rows"]:
        if row["trials"] in before:
            then, now = before[row["trials"]], row["trials_per_hour"]
            lines.append(f"{row['trials']} at once: {then:.0f} -> {now:.0f} trials/h ({now / then:.2f} times as many)")
    return lines
