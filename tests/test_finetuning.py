"""Fine-tuning: data sets, what is trained, what is written, what bad input says."""

import json

import finetune
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mobilenets_zoo as mz

pytest.importorskip("sklearn")
pytest.importorskip("skimage")


def make_folder(path, classes=("blue", "red"), count=6, size=(20, 30)):
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., 2 if label == 0 else 0] += 150
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


def arguments(*args: object):
    return finetune.parse([*map(str, args)])


@pytest.mark.parametrize(("name", "channels", "classes", "size"), [("digits", 1, 10, 16), ("faces", 1, 2, 24)])
def test_packaged_data_sets(name, channels, classes, size):
    data = getattr(finetune, name)(None)
    assert data.train.images.shape[1:] == (size, size, channels)
    assert len(data.train.classes) == classes
    assert data.train.images.dtype == np.uint8
    assert data.train.images.max() > 240
    everything = np.concatenate([data.train.images, data.test.images])
    assert len(everything) == {"digits": 1797, "faces": 200}[name]
    assert np.bincount(data.test.labels).min() >= 0.15 * len(everything) / classes


def test_fine_tuning_on_a_folder(tmp_path, capsys):
    images = make_folder(tmp_path / "images")
    out = tmp_path / "out"
    command = ["mobilenetv1_w025_cifar100", "--data", images, "--out", out, "--epochs", 12, "--batch-size", 5]
    assert finetune.main([*map(str, command)]) == 0
    assert "top-1" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["classes"] == 2
    assert result["train_images"] == 10
    assert result["training_losses"][-1] < result["training_losses"][0]
    classifier = mz.OnnxClassifier(out / "model.onnx")
    assert classifier.metadata["class_names"] == ["blue", "red"]
    data = finetune.folder(images, None, grey=False)
    predicted = classifier(data.train.images).argmax(1)
    assert (predicted == data.train.labels).mean() > 0.8
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()  # with the data's classes, mean and deviation
    cfg = again.pretrained_cfg
    assert list(cfg["label_names"]) == ["blue", "red"]
    assert list(cfg["mean"]) == pytest.approx(classifier.metadata["mean"])
    pixels = mz.evaluation.preprocess(torch.from_numpy(data.train.images), cfg["mean"], cfg["std"])
    assert again(pixels).argmax(1).tolist() == predicted.tolist()


def test_train_and_test_folders(tmp_path):
    make_folder(tmp_path / "train", count=4)
    make_folder(tmp_path / "test", count=3)
    data = finetune.folder(tmp_path, 16, grey=True)
    assert data.train.images.shape == (8, 16, 16, 1)
    assert data.test.images.shape == (6, 16, 16, 1)


def tiny(data, count=24):
    part = mz.data.ImageSet(data.train.images[:count], data.train.labels[:count], data.train.classes)
    return finetune.DataSet(part, part, data.flip)


@pytest.mark.parametrize("learn", [False, True])
def test_masks_are_kept_or_learned_anew(learn):
    data = tiny(finetune.digits(None))
    model = finetune.create("mobilenetv2_lgc_cifar100", data, pretrained=False, learn_masks=learn)
    layers = [m for m in model.modules() if isinstance(m, mz.LearnedGroupConv2d)]
    if not learn:
        for layer in layers:
            layer.prune_(layer.in_channels // 4)
    before = [layer.mask.clone() for layer in layers]
    args = arguments("mobilenetv2_lgc_cifar100", "--data", "digits", "--epochs", 2, "--scratch", "--batch-size", 12)
    with finetune.Progress(disable=True) as progress:
        finetune.finetune(model, data, args, progress)
    kept = all(torch.equal(a, layer.mask) for a, layer in zip(before, layers, strict=True))
    assert kept != learn
    mz.check_equivalent(model.eval(), mz.condense(model).eval(), torch.randn(2, 1, 16, 16))


def test_a_frozen_trunk_stays_as_it_is():
    data = tiny(finetune.faces(None))
    model = finetune.create("mobilenetv1_w025_cifar100", data, pretrained=True, learn_masks=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = arguments("mobilenetv1_w025_cifar100", "--data", "faces", "--epochs", 1, "--freeze")
    with finetune.Progress(disable=True) as progress:
        finetune.finetune(model, data, args, progress)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("nonsense", "digits", "there is no model"),
        ("mobilenetv1_w025_cifar100", "no/such", "no such folder"),
        ("mobilenetv1_w025_cifar100", ".", "two classes or more"),
    ],
)
def test_bad_input_is_one_line(model, data, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert finetune.main([model, "--data", data]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_a_broken_image_is_named(tmp_path):
    images = make_folder(tmp_path)
    (images / "red" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"red/0\.png: not a readable image"):
        finetune.folder(images, None, False)
