"""The demo's picture: what each version of the base adds over v0, on seen and on unseen datasets, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 780, 460, 70, 200, 84, 60
COLORS = {"seen": "#b35806", "unseen": "#1f5fa8"}


@dataclass(frozen=True, slots=True)
class Point:
    """The gain of one version over v0 on one fold, in points: mean over datasets, 95 % interval, and by dataset."""

    version: str
    fold: str
    mean: float
    low: float
    high: float
    datasets: dict[str, float]


def draw(title: str, subtitle: str, points: Sequence[Point]) -> str:
    """An SVG file: versions from left to right, gain upwards, a line with intervals for each fold.

    Small dots are the datasets. v0 is where both lines start, at 0.
    """
    versions = ["v0", *dict.fromkeys(p.version for p in points)]
    values = [0.0, *(v for p in points for v in (p.low, p.high, *p.datasets.values()))]
    scale = _Scale(min(values), max(values), len(versions))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(LEFT, 30, title, 'font-size="17" font-weight="600"'),
        *(_text(LEFT, 50 + 16 * i, line, 'fill="#555" font-size="12"') for i, line in enumerate(subtitle.split("\n"))),
        *_draw_axes(scale, versions),
        *(part for fold in COLORS for part in _draw_fold(scale, versions, [p for p in points if p.fold == fold])),
        *_draw_legend([p for p in points if p.version == versions[-1]], versions[-1]),
        "</svg>\n",
    ]
    return "\n".join(parts)


class _Scale:
    """Where a version and a gain are in the picture, and the round gains that get a line."""

    def __init__(self, low: float, high: float, versions: int) -> None:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = -1.0, 1.0
        span = high - low
        step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if span / s <= 8 or s == 50)
        first, last = int(low // step), int(-(-high // step))
        self.ticks = [step * i for i in range(first, last + 1)]
        self.versions = versions

    def x(self, version: int) -> float:
        return LEFT + 40 + (WIDTH - LEFT - RIGHT - 80) * version / max(1, self.versions - 1)

    def y(self, gain: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - gain) / (high - low)


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra or ""}>{escape(text)}</text>'


def _draw_axes(scale: _Scale, versions: Sequence[str]) -> Iterator[str]:
    for tick in scale.ticks:
        y, color = scale.y(tick), "#888" if tick == 0 else "#e4e4e4"
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{color}"/>'
        yield _text(LEFT - 8, y + 4, f"{tick:+g}" if tick else "0", 'text-anchor="end" fill="#555"')
    for number, version in enumerate(versions):
        yield _text(scale.x(number), HEIGHT - BOTTOM + 24, version, 'text-anchor="middle"')
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'text-anchor="middle" fill="#555" transform="rotate(-90 20 {middle})"'
    yield _text(20, middle, "gain over v0, points", turned)
    yield _text(
        LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 14, "version of the base", 'text-anchor="middle" fill="#555"'
    )


def _draw_fold(scale: _Scale, versions: Sequence[str], points: Sequence[Point]) -> Iterator[str]:
    if not points:
        return
    fold = points[0].fold
    color, aside = COLORS[fold], -7 if fold == "seen" else 7
    line = [(scale.x(0), scale.y(0.0))]
    for point in points:
        x = scale.x(versions.index(point.version)) + aside
        line.append((x, scale.y(point.mean)))
        for name, gain in point.datasets.items():
            place = f'cx="{x + 2 * aside:.1f}" cy="{scale.y(gain):.1f}" r="3"'
            title = f"<title>{escape(name)} {gain:+.2f}</title>"
            yield f'<circle {place} fill="{color}" fill-opacity="0.45">{title}</circle>'
        top, bottom = scale.y(point.high), scale.y(point.low)
        bar = f"M{x - 5:.1f} {top:.1f}h10M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 5:.1f} {bottom:.1f}h10"
        yield f'<path d="{bar}" stroke="{color}" stroke-width="2" fill="none"/>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
    yield f'<path d="M{path}" stroke="{color}" stroke-width="2" fill="none"/>'
    for x, y in line[1:]:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>'


def _draw_legend(points: Sequence[Point], version: str) -> Iterator[str]:
    left, y = WIDTH - RIGHT + 14, TOP + 8
    for point in points:
        color = COLORS[point.fold]
        yield f'<circle cx="{left + 5}" cy="{y - 4}" r="5" fill="{color}"/>'
        yield _text(left + 16, y, f"{point.fold}, {version}: {point.mean:+.2f}", f'font-weight="600" fill="{color}"')
        yield _text(left + 16, y + 17, f"95 %: {point.low:+.2f} to {point.high:+.2f}", 'font-size="12" fill="#555"')
        for number, (name, gain) in enumerate(sorted(point.datasets.items(), key=lambda item: -item[1])):
            yield _text(left + 16, y + 37 + 16 * number, f"{name} {gain:+.1f}", 'font-size="12" fill="#555"')
        y += 37 + 16 * len(point.datasets) + 22
