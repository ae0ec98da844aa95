"""Positions of contributions in weight space: clusters, centroid and a map, as numbers, text and a picture.

*Knowledge is a Region in Weight Space* (arXiv 2302.04863): task vectors of the same data have similar directions, those
of other data are nearly orthogonal. Everything is computed from the norms and cosines of a `SoundnessReport`: the inner
products ⟨τᵢ, τⱼ⟩ = ‖τᵢ‖‖τⱼ‖ cos suffice for distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np
from numpy.typing import NDArray

from hubfusion.screen.soundness import Measure, SoundnessReport

RELATED = 0.15
CELL, LEFT, TOP, BAR = 26, 260, 70, 160
MAP = 320


def _products(report: SoundnessReport, longest: float = np.inf) -> NDArray[np.float64]:
    """Inner products of the task vectors (N, N), those longer than ``longest`` shortened to it."""
    norms = np.minimum([m.norm for m in report.measures], longest)
    cosines = np.array(report.cosines).reshape(len(norms), len(norms))
    np.fill_diagonal(cosines, 1.0)
    products: NDArray[np.float64] = norms[:, None] * norms[None] * cosines
    return products


def centroid_distances(report: SoundnessReport) -> tuple[float, ...]:
    """‖τ − mean of all τ‖ for each of ``report.measures``: who lies outside the region that the batch spans."""
    products = _products(report)
    if not len(products):
        return ()
    squares = np.diag(products) - 2 * products.mean(axis=1) + products.mean()
    return tuple(float(d) for d in np.sqrt(np.maximum(squares, 0.0)))


def clusters(report: SoundnessReport, related: float = RELATED) -> tuple[int, ...]:
    """A cluster number for each of ``report.measures``: those linked by cosines above ``related`` share one.

    Numbers count from 0 in the order of the oldest member.
    """
    label = list(range(len(report.measures)))
    for i, row in enumerate(report.cosines):
        for j in range(i):
            if row[j] > related and label[i] != label[j]:
                old, new = max(label[i], label[j]), min(label[i], label[j])
                label = [new if each == old else each for each in label]
    order = {old: number for number, old in enumerate(dict.fromkeys(label))}
    return tuple(order[each] for each in label)


def plane(report: SoundnessReport) -> NDArray[np.float64]:
    """Coordinates (N + 1, 2) of the contributions and, last, of the base, that keep distances as well as two can.

    Principal coordinates (classical scaling) of the task vectors and the zero vector. Vectors longer than the
    median are cut to it, as the clipped fuse does: else one boosted update would press all others into a point.
    """
    count = len(report.measures) + 1
    products = np.zeros((count, count))
    products[:-1, :-1] = _products(report, report.median or np.inf)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ products @ centring)
    top = np.argsort(values)[::-1][:2]
    coordinates: NDArray[np.float64] = np.zeros((count, 2))
    coordinates[:, : len(top)] = vectors[:, top] * np.sqrt(np.maximum(values[top], 0.0))
    return coordinates


def verdict(report: SoundnessReport, measure: Measure) -> str:
    """``ok`` or the reason of the rejection."""
    return next((str(r.reason) for r in report.rejected if r.revision == measure.revision), "ok")


def lines(report: SoundnessReport) -> Iterator[str]:
    """The report as plain lines: one for each contribution, then the reasons of rejections."""
    numbers, far = clusters(report), centroid_distances(report)
    heads = f"{'norm':>9} {'of base':>9} {'centroid':>9} {'nearest':>8} {'cluster':>7}"
    yield f"{'contribution':40} {heads}  trained, verdict"
    for measure, number, distance in zip(report.measures, numbers, far, strict=True):
        name, trained = str(measure.revision)[:40], f"{measure.kind}, {verdict(report, measure)}"
        sizes = f"{measure.norm:9.4g} {measure.relative:9.2%} {distance:9.4g}"
        yield f"{name:40} {sizes} {measure.nearest:>8} {number:>7}  {trained}"
    for each in report.rejected:
        yield f"out: {each.revision}: {each.reason}: {each.detail}"
    yield f"median norm of those that stay: {report.median:.4g}"


def draw(report: SoundnessReport) -> str:
    """The report as one SVG: names and norms, the matrix of cosines, a map with the base in it. No script, no link."""
    count = len(report.measures)
    width = LEFT + BAR + 30 + count * CELL + 40 + MAP + 20
    height = TOP + max(count * CELL, MAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *_draw_norms(report),
        *_draw_cosines(report, LEFT + BAR + 30),
        *_draw_map(report, LEFT + BAR + 30 + count * CELL + 40),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222" {extra}>{escape(text)}</text>'


def _draw_norms(report: SoundnessReport) -> Iterator[str]:
    yield _text(12, 28, "Norm of the update", 'font-weight="600"')
    yield _text(12, 46, f"dashed: median {report.median:.3g}", 'fill-opacity="0.7"')
    longest = max((m.norm for m in report.measures), default=1.0) or 1.0
    for row, measure in enumerate(report.measures):
        y, out = TOP + row * CELL, verdict(report, measure) != "ok"
        name = measure.revision.repo if len(measure.revision.repo) <= 36 else measure.revision.repo[:35] + "…"
        yield _text(12, y + 16, name)
        # The fourth root: benign norms differ 50-fold, boosted ones 1000-fold, and both should be seen.
        length = BAR * (measure.norm / longest) ** 0.25
        color = "#c0392b" if out else "#2c7fb8"
        yield f'<rect x="{LEFT}" y="{y + 5}" width="{length:.1f}" height="{CELL - 10}" fill="{color}"/>'
        yield _text(
            LEFT + 4,
            y + 17,
            f"{measure.norm:.3g}",
            'font-size="10" stroke="#fff" stroke-width="2" paint-order="stroke"',
        )
    if report.median:
        x = LEFT + BAR * (report.median / longest) ** 0.25
        bottom = TOP + len(report.measures) * CELL
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#222" stroke-dasharray="3 3"/>'


def _draw_cosines(report: SoundnessReport, left: int) -> Iterator[str]:
    yield _text(left, 28, "Cosine of updates", 'font-weight="600"')
    yield _text(left, 46, "blue −1 · white 0 · red +1", 'fill-opacity="0.7"')
    for i, row in enumerate(report.cosines):
        for j, cosine in enumerate(row):
            fade = round(255 * (1 - min(1.0, abs(cosine))))
            color = f"rgb(255,{fade},{fade})" if cosine > 0 else f"rgb({fade},{fade},255)"
            box = f'x="{left + j * CELL}" y="{TOP + i * CELL}" width="{CELL - 1}" height="{CELL - 1}"'
            yield f'<rect {box} fill="{color}" stroke="#ddd"><title>{cosine:.3f}</title></rect>'


def _draw_map(report: SoundnessReport, left: int) -> Iterator[str]:
    yield _text(left, 28, "Map of weight space", 'font-weight="600"')
    yield _text(left, 46, "cross: base · number: cluster · clipped to the median", 'fill-opacity="0.7"')
    yield f'<rect x="{left}" y="{TOP}" width="{MAP}" height="{MAP}" fill="#fafafa" stroke="#ddd"/>'
    points, numbers = plane(report), clusters(report)
    reach = float(np.abs(points).max()) or 1.0
    places = left + MAP / 2 + points[:, 0] / reach * MAP * 0.45, TOP + MAP / 2 - points[:, 1] / reach * MAP * 0.45
    for measure, number, x, y in zip(report.measures, numbers, places[0][:-1], places[1][:-1], strict=True):
        color = "#2c7fb8" if verdict(report, measure) == "ok" else "#c0392b"
        title = f"<title>{escape(str(measure.revision))}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" fill-opacity="0.8">{title}</circle>'
        yield _text(x + 7, y + 4, str(number), 'font-size="10"')
    x, y = places[0][-1], places[1][-1]
    yield f'<path d="M{x - 6:.1f} {y:.1f}h12M{x:.1f} {y - 6:.1f}v12" stroke="#222" stroke-width="2"/>'
