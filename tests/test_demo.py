"""What the demo page is made of, without a browser; docs/check_demo.py uses the page itself."""

import re

import build_demo
import numpy as np
import publish
import pytest
from huggingface_hub import SpaceCard
from PIL import Image

import mobilenets_zoo as mz
import mobilenets_zoo_cli as cli
from mobilenets_zoo import data

PAGE = {path.name: path.read_text() for path in build_demo.PAGE.iterdir() if path.suffix in (".html", ".js", ".css")}


def test_the_page_has_pythons_limits_and_stays_small():
    declared = re.search(r"MAX_PIXELS = (\w+), MAX_BYTES = (\d+) \* 2 \*\* (\d+), LARGE_SIDE = (\d+)", PAGE["demo.js"])
    pixels, factor, power, side = map(float, declared.groups())
    assert (pixels, factor * 2**power, side) == (data.MAX_PIXELS, cli.MAX_IMAGE_BYTES, data.LARGE_SIDE)
    lines = [line for text in PAGE.values() for line in text.splitlines()]
    assert len(PAGE) == 3
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 120


def test_sample_pictures_lie_within_their_photos(tmp_path):
    photos = build_demo.sample_photos()
    rows = build_demo.write_samples(tmp_path, photos)
    assert len(rows) == len({row["name"] for row in rows}) == 12
    for row, (_, photo, (left, top, right, bottom), label) in zip(rows, build_demo.SAMPLES, strict=True):
        assert 0 <= left < right <= photos[photo].width
        assert 0 <= top < bottom <= photos[photo].height
        assert label in (None, *mz.CIFAR100_CLASSES)
        assert ("none of the 100" in row["note"]) == (label is None)
        with Image.open(tmp_path / row["file"]) as picture:
            assert max(picture.size) <= build_demo.SAMPLE_SIDE
    crops = build_demo.calibration_crops(photos)
    assert crops.shape == (build_demo.CALIBRATION_IMAGES, 32, 32, 3)
    np.testing.assert_array_equal(crops, build_demo.calibration_crops(photos))


@pytest.mark.parametrize(
    ("npm", "message"),
    [
        (None, "npm is missing"),
        ('#!/bin/sh\necho "no such package" >&2; exit 1\n', "no such package"),
        ('#!/bin/sh\necho other > "$5/onnxruntime-web-1.0.0.tgz"\n', "don't use it"),
    ],
    ids=["missing", "failing", "another-package"],
)
def test_only_the_pinned_runtime_is_taken(npm, message, tmp_path, monkeypatch, capsys):
    tools = tmp_path / "tools"
    tools.mkdir()
    if npm:
        (tools / "npm").write_text(npm)
        (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    assert build_demo.main([str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "demo").exists()


def test_an_occupied_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert build_demo.main([str(tmp_path)]) == 2
    assert "choose an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_space_is_the_page_with_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(build_demo, "build", lambda folder, home: folder.mkdir() or (folder / home[-2:]).touch())
    assert publish.main(["--space", str(tmp_path / "space"), "--namespace", "me"]) == 0
    assert (tmp_path / "space" / "me").exists()
    card = SpaceCard.load(tmp_path / "space" / "README.md").data
    assert (card.sdk, card.app_file) == ("static", "index.html")
    assert card.custom_headers["cross-origin-embedder-policy"] == "require-corp"
    assert card.custom_headers["cross-origin-opener-policy"] == "same-origin"
