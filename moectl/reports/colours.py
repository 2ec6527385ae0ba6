"""Colour for shares: one diverging scale, centred on the uniform share, safe for colour-blind readers.

Blue below, white at 1/E, red above (ColorBrewer's RdBu, reversed), the same in terminal and figure.
"""

from __future__ import annotations

#: ColorBrewer RdBu, 11 classes, from low (blue) to high (red).
DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
    "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip


def position(share: float, uniform: float, highest: float) -> float:
    """Place of a share on the scale, 0 to 1: 0 at no share, 0.5 at uniform, 1 at ``highest``."""
    if share <= uniform:
        return 0.5 * share / uniform
    return 0.5 + 0.5 * (share - uniform) / (highest - uniform) if highest > uniform else 0.5


def colour(place: float) -> tuple[int, int, int]:
    """Red, green and blue (0-255) at a place of the scale, interpolated between the classes."""
    scaled = min(max(place, 0.0), 1.0) * (len(DIVERGING) - 1)
    low = min(int(scaled), len(DIVERGING) - 2)
    first, second = _channels(DIVERGING[low]), _channels(DIVERGING[low + 1])
    mixed = [round(a + (b - a) * (scaled - low)) for a, b in zip(first, second, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def needs_light_text(rgb: tuple[int, int, int]) -> bool:
    """Whether white text reads better than black on this background (relative luminance, WCAG 2)."""
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.18


def _channels(code: str) -> tuple[int, ...]:
    return tuple(int(code[start : start + 2], 16) for start in (1, 3, 5))
