"""Reading data sets in the layouts that users have, and measuring on them."""

import hashlib
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from mobilenets_zoo.data import ImageSet, load_images, read_image, read_split
from mobilenets_zoo.evaluation import evaluate
from mobilenets_zoo.utils import atomic_write

TEST_PIXELS = "25298951534f6b9afdfd0676eff99bb482acc7b9a68051dfc6c35006f90af038"


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png(seed: int) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return pixels, encoded(Image.fromarray(pixels))


def write_parquet(path, seeds, column="fine_label", names=("a", "b", "c")):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(seed)[1], "path": f"{seed}.png"} for seed in seeds]
    features = {"info": {"features": {column: {"names": list(names)}}}}
    table = pa.table({"img": images, column: [seed % 3 for seed in seeds]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


@pytest.mark.parametrize(("column", "folder"), [("fine_label", "."), ("label", "plain_text")])
def test_parquet_shards_keep_their_order(tmp_path, column, folder):
    write_parquet(tmp_path / folder / "train-00000-of-00002.parquet", [0, 1], column)
    write_parquet(tmp_path / folder / "train-00001-of-00002.parquet", [2, 3, 4], column)
    write_parquet(tmp_path / folder / "test-00000-of-00001.parquet", [5], column)
    data = load_images(tmp_path, "train")
    assert data.labels.tolist() == [0, 1, 2, 0, 1]
    assert data.classes == ("a", "b", "c")
    assert all(np.array_equal(data.images[i], png(i)[0]) for i in range(5))
    assert len(load_images(str(tmp_path), "test")) == 1
    assert len(load_images(tmp_path / folder / "train-00001-of-00002.parquet", "test")) == 3  # a file is what it is


def test_torchvision_root(tmp_path, monkeypatch):
    """A root as torchvision unpacks it; its md5 table is replaced by that of the made-up files."""
    from torchvision import datasets

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = {"data": np.arange(2 * 3072, dtype=np.uint64).reshape(2, 3072).astype(np.uint8), "fine_labels": [1, 0]}
    for name, content in {"train": rows, "test": rows, "meta": {"fine_label_names": ["x", "y"]}}.items():
        (folder / name).write_bytes(pickle.dumps(content))

    def digest(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", digest("train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", digest("test")]])
    monkeypatch.setattr(
        datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest("meta")}
    )
    data = load_images(tmp_path, "test")
    assert data.images.shape == (2, 32, 32, 3)
    assert data.labels.tolist() == [1, 0]
    assert data.classes == ("x", "y")
    assert load_images(folder, "test").classes == ("x", "y")
    model = timm.create_model("mobilenetv1_w025_cifar100", device="meta")
    for source in (tmp_path, folder):
        assert read_split(source, "test", model).labels.tolist() == [1, 0]
    (folder / "test").write_bytes(b"altered")
    with pytest.raises(ValueError, match="torchvision can't read CIFAR100"):
        load_images(tmp_path, "test")


@pytest.mark.parametrize("other", ["cifar10/test-00000-of-00001.parquet", "cifar-10-batches-py", "cifar-100-python"])
def test_several_data_sets_are_not_mixed(tmp_path, other):
    write_parquet(tmp_path / "cifar100" / "test-00000-of-00001.parquet", [0, 1])
    if other.endswith(".parquet"):
        write_parquet(tmp_path / other, [2], "label", ("x", "y", "z"))
    else:
        (tmp_path / other).mkdir()
    with pytest.raises(ValueError, match=rf"several data sets; give one of .*{other.partition('/')[0]}") as error:
        load_images(tmp_path, "test")
    assert str(tmp_path / "cifar100") in str(error.value)
    assert load_images(tmp_path / "cifar100", "test").labels.tolist() == [0, 1]


def test_shards_of_two_data_sets_in_one_folder_are_not_mixed(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00002.parquet", [0])
    write_parquet(tmp_path / "test-00001-of-00002.parquet", [1], "label", ("x", "y", "z"))
    with pytest.raises(ValueError, match=r"test-00001-of-00002.*belongs to another data set"):
        load_images(tmp_path, "test")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_broken_parquet_is_named(tmp_path, content):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: can't be read"):
        load_images(tmp_path, "train")


def table(images=None, labels=(0, 1), metadata=None) -> pa.Table:
    images = [{"bytes": png(seed)[1], "path": ""} for seed in range(2)] if images is None else images
    made = pa.table({"img": images, "fine_label": labels})
    names = {"info": {"features": {"fine_label": {"names": ["a", "b", "c"]}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(names) if metadata is None else metadata})


def bomb(mode: str = "1", side: int = 20_000) -> bytes:
    return encoded(Image.new(mode, (side, side)))


def small(size: tuple[int, int]) -> dict[str, object]:
    return {"bytes": encoded(Image.new("RGB", size)), "path": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pa.table({"x": [1]}), r"columns \['x'\], expected img"),
        (lambda: table(images=["a", "b"]), "img must hold structs"),
        (lambda: table(images=[{"bytes": "photo.png", "path": ""}] * 2), "img must hold structs"),  # not a path
        (lambda: table(labels=[0, None]), "whole numbers and no nulls"),
        (lambda: table(labels=[0.0, 1.0]), "whole numbers and no nulls"),
        (lambda: table(labels=["0", "1"]), "whole numbers and no nulls"),
        (lambda: table(labels=[0, -100]), "labels reach from -100 to 0, there are 3 classes"),
        (lambda: table(labels=[0, 3]), "labels reach from 0 to 3, there are 3 classes"),
        (lambda: table().slice(0, 0), "hold no images"),
        (lambda: table(images=[small((32, 32)), small((16, 32))]), "are mixed"),
        (lambda: table(images=[small((32, 32)), {"bytes": None, "path": ""}]), "not a readable image"),
        (lambda: table(images=[small((32, 32)), {"bytes": bomb(), "path": ""}]), "more than 50 million pixels"),
    ],
)
def test_what_is_wrong_in_a_table_is_one_line(tmp_path, content, message):
    pq.write_table(content(), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load_images(tmp_path, "test")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_parquet_images_are_read_as_files_are(tmp_path):
    deep = Image.fromarray(np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16))
    contents = [encoded(deep), encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))]
    pq.write_table(table(images=[{"bytes": content, "path": ""} for content in contents]), tmp_path / "test-0.parquet")
    grey, white = load_images(tmp_path, "test").images
    assert np.array_equal(grey, np.asarray(read_image(contents[0])))
    assert 120 < grey.mean() < 135
    assert (white == 255).all()


def test_long_names_of_any_script_are_written(tmp_path):
    path = tmp_path / ("好" * 80 + ".onnx")
    with atomic_write(path, "w") as file:
        file.write("whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such folder: '.*none'"), atomic_write(tmp_path / "none" / "file"):
        pass


@pytest.mark.parametrize("metadata", ["null", "[]", "3", '{"info": null}', '{"info": {"features": []}}'])
def test_metadata_of_other_shapes_names_no_classes(tmp_path, metadata):
    pq.write_table(table(metadata=metadata), tmp_path / "test-00000-of-00001.parquet")
    assert load_images(tmp_path, "test").classes == ("0", "1")


@pytest.mark.parametrize(("mode", "side"), [("1", 7_100), ("L", 9_600), ("1", 20_000)])
def test_images_with_too_many_pixels_are_not_decoded(mode, side):
    """Below Pillow's own warning, between it and its error, and above both."""
    with pytest.raises(ValueError, match=r"^x: has more than 50 million pixels; make it smaller$"):
        read_image(bomb(mode, side), "x")


def test_large_images_come_back_smaller_and_alike():
    y, x = np.mgrid[0:1500, 0:3000]
    pixels = np.stack([x % 256, y % 256, (x + y) // 20 % 256], -1).astype(np.uint8)
    image = read_image(encoded(Image.fromarray(pixels)), "x")
    assert image.size == (1024, 512)
    expected = Image.fromarray(pixels).resize((32, 16), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC), int) - np.asarray(expected, int))
    assert difference.mean() < 2


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"  # would call Ghostscript


@pytest.mark.parametrize("content", [EPS, b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"text", bytes(1000)])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(content, "x")


def test_folders_without_data_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"train-\*\.parquet.*uoft-cs/cifar100"):
        load_images(tmp_path, "train")
    with pytest.raises(ValueError, match="no such folder"):
        load_images(tmp_path / "missing", "train")
    with pytest.raises(ValueError, match="split"):
        load_images(tmp_path, "validation")


def test_a_hub_id_reads_what_was_downloaded(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x" / "test-0.parquet", [4])
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (asked.append((a, k)), str(tmp_path))[1])
    model = timm.create_model("mobilenetv1_w025_cifar100", device="meta")
    assert read_split("uoft-cs/cifar100", "test", model).labels.tolist() == [1]
    assert asked == [(("uoft-cs/cifar100",), {"repo_type": "dataset", "allow_patterns": ["*test-*.parquet"]})]


def photos(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(png(len(name))[0]).save(folder / name)


def test_what_is_held_out_stays_so_when_images_are_added(tmp_path):
    """Of a folder by the images' names, of Parquet by their pixels; the labels tell which image is which."""
    model = timm.create_model("mobilenetv1_w025_cifar100")
    photos(tmp_path / "photos", [f"{kind}/{number}.png" for kind in "ab" for number in range(40)])

    def held(source):
        paths = []
        read_split(source, "test", model, lambda images: paths.extend(images) or images)
        return [path.tobytes() if isinstance(path, np.ndarray) else path for path in paths]

    before = held(tmp_path / "photos")
    assert 8 <= len(before) <= 24  # 16 of 80
    photos(tmp_path / "photos", ["a/0first.png", *(f"b/{number}.png" for number in range(50, 60))])
    after = held(tmp_path / "photos")
    assert [path for path in after if path in before] == before
    assert all(path.stem == "0first" or int(path.stem) >= 50 for path in set(after) - set(before))

    file = tmp_path / "some.parquet"
    write_parquet(file, range(60))
    before = held(file)
    write_parquet(file, range(66))
    assert set(before) < set(held(file)) or before == held(file)
    train, test = (read_split(file, split, model) for split in ("train", "test"))
    assert len(train) + len(test) == 66
    assert set(test.labels) == {0, 1, 2}


def test_a_class_of_one_or_two_images_has_one_to_test_with(tmp_path):
    model = timm.create_model("mobilenetv1_w025_cifar100")
    photos(tmp_path, ["a/1.png", "b/1.png", "b/2.png"])
    assert [read_split(tmp_path, split, model).labels.tolist() for split in ("train", "test")] == [[1], [0, 1]]
    write_parquet(tmp_path / "alike.parquet", [3, 3, 3])
    assert all(len(read_split(tmp_path / "alike.parquet", split, model)) for split in ("train", "test"))


@pytest.mark.parametrize("place", ["test", "photos/test", "photos/Validation"])
def test_images_named_as_test_images_are_all_for_testing(tmp_path, place):
    model = timm.create_model("mobilenetv1_w025_cifar100")
    photos(tmp_path / place, [f"{kind}/{number}.png" for kind in "ab" for number in range(3)])
    sources = {tmp_path / place, (tmp_path / place).parent} - {tmp_path}
    write_parquet(tmp_path / "test-0.parquet", range(6))
    for source in (*sources, tmp_path / "test-0.parquet"):
        assert len(read_split(source, "test", model)) == 6
        with pytest.raises(ValueError, match="what is named as test images is all there is; put"):
            read_split(source, "train", model)


@pytest.mark.parametrize("error", [OSError, type("ProxyError", (Exception,), {})])
def test_hub_errors_are_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error("offline\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=r"^uoft-cs/cifar100: could not be downloaded \(offline\)"):
        load_images("uoft-cs/cifar100", "test")


def made_up(images: int = 6, classes: int = 100, channels: int = 3) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, channels), dtype=np.uint8)
    return ImageSet(pixels, np.arange(images) % 3, tuple(map(str, range(classes))))


def test_evaluation_counts_what_occurs_and_restores_the_mode():
    model = timm.create_model("mobilenetv1_w025_cifar100").train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    result = evaluate(model, made_up(), batch_size=4)
    assert [module.training for module in model.modules()] == flags
    assert result.per_class[3:] == (None,) * 97
    assert result.top1 == pytest.approx(sum(result.per_class[:3]) / 3, abs=1e-3)
    assert "NaN" not in json.dumps(result.to_dict())


def test_scores_follow_their_definitions():
    sure, unsure = [0.9, *5 * [0.02]], [0.64, 0.08, *4 * [0.07]]
    rows = torch.tensor([sure, [0.62, 0.3, *4 * [0.02]], [0.3, 0.25, 0.05, 0.15, 0.15, 0.1], unsure])

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
            self.scale, self.rows = torch.nn.Parameter(torch.ones(())), iter(rows.log())

        def forward(self, x):
            return torch.stack([next(self.rows) for _ in x])

    result = evaluate(Fixed(), made_up(images=4, classes=6), batch_size=3)  # of classes 0, 1, 2, 0
    assert (result.top1, result.top5, result.per_class) == (50, 75, (100, 0, 0, None, None, None))
    assert result.loss == pytest.approx(-np.log([0.9, 0.3, 0.05, 0.64]).mean())
    # By bins of a 15th: 0.9 is right; of 0.62 and 0.64 one is; 0.3 is wrong.
    assert result.ece == pytest.approx(100 * (0.1 + 0.26 + 0.3) / 4, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_evaluation_in_the_models_precision(dtype):
    model = timm.create_model("mobilenetv1_w025_cifar100", pretrained=True)
    expected = evaluate(model, made_up())
    assert evaluate(model.to(dtype), made_up()).loss == pytest.approx(expected.loss, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({}, made_up(channels=1), r"takes images of \(3, 32, 32\), the data has \(1, 32, 32\)"),
        ({"in_chans": 1}, made_up(), r"takes images of \(1, 32, 32\), the data has \(3, 32, 32\)"),
        ({}, made_up(classes=10), "has 100 classes, the data has 10"),
        # Folders are in the order of text; numbers in their own order are labels without names.
        (
            {"pretrained_cfg_overlay": {"label_names": sorted(map(str, range(12)))}, "num_classes": 12},
            made_up(classes=12),
            "classes are 0, 1, 10, ..., the data's 0, 1, 2, ...",
        ),
        ({}, made_up(images=0), "no images"),
    ],
)
def test_evaluation_checks_first_what_fits(arguments, data, message):
    model = timm.create_model("mobilenetv1_w025_cifar100", **arguments)
    done = []
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, 2, done.append)
    assert not done
    assert model.training


@pytest.mark.parametrize("form", ["{}", "{:02}"])
def test_labels_without_names_fit_any_names(form):
    data = replace(made_up(classes=12), classes=tuple(map(form.format, range(12))))
    cfg = {"label_names": [f"class {label}" for label in range(12)]}
    model = timm.create_model("mobilenetv1_w025_cifar100", num_classes=12, pretrained_cfg_overlay=cfg)
    assert evaluate(model, data).images == len(data)
    with pytest.raises(ValueError, match="the model's classes are class 0, "):
        evaluate(model, replace(data, classes=data.classes[::-1]))


def test_outputs_that_are_not_finite_are_no_result():
    model = timm.create_model("mobilenetv1_w025_cifar100")
    model.classifier.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="outputs are not finite"):
        evaluate(model, made_up())


def test_a_grey_model_is_evaluated_on_grey_images():
    model = timm.create_model("mobilenetv1_w025_cifar100", in_chans=1)
    assert evaluate(model, made_up(channels=1)).images == 6


@pytest.mark.cifar100
def test_cifar100_itself(test_images):
    """The training images are those whose digest the shipped soft labels know, see test_training.py."""
    assert test_images.sha256() == TEST_PIXELS
    assert np.bincount(test_images.labels).tolist() == [100] * 100
