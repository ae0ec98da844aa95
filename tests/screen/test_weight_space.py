from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from hubfusion.lineage import Reason, Rejected, Revision
from hubfusion.screen import Measure, SoundnessReport
from hubfusion.screen.weight_space import centroid_distances, clusters, draw, lines, plane


def report(norms: list[float], cosines: list[list[float]], out: tuple[int, ...] = ()) -> SoundnessReport:
    revisions = [Revision(f"user{i}/model", f"{i:040x}") for i in range(len(norms))]
    measures = tuple(
        Measure(r, r.repo[:5], n, n / 100, 0.0, 0.1, 1000.0, "whole backbone", {"a": 1.0}, "v1", {"v1": n})
        for r, n in zip(revisions, norms, strict=True)
    )
    rejected = tuple(Rejected(revisions[i], "x", Reason.OUTLIER, "too long") for i in out)
    return SoundnessReport(measures, tuple(tuple(row) for row in cosines), rejected, 5.0, 1000, 1)


def test_distances_to_the_centroid_of_a_right_angle() -> None:
    # τ₁ = (3, 0), τ₂ = (0, 4): mean (1.5, 2), both sqrt(1.5² + 2²) = 2.5 away.
    assert centroid_distances(report([3.0, 4.0], [[1, 0], [0, 1]])) == pytest.approx((2.5, 2.5))


def test_the_map_keeps_the_distances_of_three_points_in_a_plane() -> None:
    points = plane(report([3.0, 4.0], [[1, 0], [0, 1]]))
    far = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert far[0, 2] == pytest.approx(3) and far[1, 2] == pytest.approx(4) and far[0, 1] == pytest.approx(5)


def test_one_boosted_update_does_not_press_the_others_into_a_point() -> None:
    points = plane(report([3.0, 4.0, 3000.0], np.eye(3).tolist()))
    far = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert far.max() < 10 and far[0, 1] > 1


def test_related_updates_share_a_cluster_through_a_chain() -> None:
    cosines = [[1, 0, 0.2, 0], [0, 1, 0, 0], [0.2, 0, 1, 0.3], [0, 0, 0.3, 1]]
    assert clusters(report([1.0] * 4, cosines)) == (0, 1, 0, 0)
    assert clusters(report([1.0] * 4, cosines), related=0.25) == (0, 1, 2, 2)


def test_the_lines_say_who_is_out_and_why() -> None:
    text = "\n".join(lines(report([3.0, 400.0], [[1, 0], [0, 1]], out=(1,))))
    assert "user0/model@000000000000" in text and "whole backbone, ok" in text
    assert "whole backbone, outlier" in text and "out: user1/model@000000000000: outlier: too long" in text


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_the_picture_is_an_svg_of_its_own_with_a_row_for_each(count: int, tmp_path: Path) -> None:
    found = report([float(i + 1) for i in range(count)], np.eye(count).tolist(), out=(0,) if count > 1 else ())
    root = ElementTree.fromstring(draw(found))
    assert root.tag.endswith("svg")
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(t.endswith("/model") for t in texts) == count
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == count
    assert not any(e.tag.endswith(("script", "image", "a", "foreignObject")) for e in root.iter())
