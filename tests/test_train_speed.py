"""The comparison of ways to train on two cores, with very few steps."""

import json

import pytest
import train_speed


@pytest.mark.cifar100
@pytest.mark.slow
def test_both_ways_are_measured(tmp_path, cifar100):
    out = tmp_path / "speed.json"
    arguments = ["--data", str(cifar100), "--models", "mobilenetv1_w025_cifar100", "--batch-size", "16"]
    assert train_speed.main([*arguments, "--steps", "2", "--turns", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == list(train_speed.WAYS)
    assert all(row["images_per_second"] > 0 and 0 <= row["outside"] < 1 for row in rows)
