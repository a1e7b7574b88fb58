"""Writes the demo page: docs/demo, ONNX Runtime for the browser, networks as ONNX files, sample pictures.

    python benchmarks/build_demo.py DIR

The page in DIR needs a web server and no other host. Fetches ONNX Runtime from npm, by its digest; needs npm,
scikit-image and the packages of `pip install 'mobilenets-zoo[onnx]'`. The int8 networks are calibrated on crops of
scikit-image's photos, so that no data set is needed.
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

import mobilenets_zoo as mz
from mobilenets_zoo.pretrained import default_entry
from mobilenets_zoo.utils import write_json

PAGE = Path(__file__).resolve().parents[1] / "docs" / "demo"

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The page's backend -> the module, what it starts, and the compiled code.
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}

# The page starts with the first.
MODELS = ("mobilenetv1_w025", "mobilenetv1", "mobilenetv2", "mobilenetv2_lgc_proj")
PAIRS = {
    "dense against learned groups": ("mobilenetv2-fp32.onnx", "mobilenetv2_lgc_proj-fp32.onnx"),
    "fp32 against int8": ("mobilenetv1_w025-fp32.onnx", "mobilenetv1_w025-int8.onnx"),
}

# Name, photo of skimage.data, box to crop, and what it shows if that is one of the classes. By their docstrings there,
# all are CC0, in the public domain or without known restrictions.
SAMPLES = (
    ("Rocket", "rocket", (213, 107, 533, 427), "rocket"),
    ("Launch pad", "rocket", (160, 0, 587, 427), "rocket"),
    ("Coffee cup", "coffee", (160, 10, 430, 280), "cup"),
    ("Cup on a saucer", "coffee", (70, 0, 470, 400), "cup"),
    ("Photographer", "camera", (100, 40, 300, 240), "man"),
    ("Tower", "camera", (330, 80, 512, 262), "skyscraper"),
    ("Model of a space shuttle", "astronaut", (350, 0, 512, 162), "rocket"),
    ("Cat", "chelsea", (120, 0, 420, 300), None),
    ("Coin", "coins", (300, 10, 364, 74), None),
    ("Retina of an eye", "retina", (0, 0, 1411, 1411), None),
    ("Bricks", "brick", (0, 0, 512, 512), None),
    ("Silhouette of a horse", "horse", (0, 0, 400, 328), None),
)
SAMPLE_SIDE = 320
CALIBRATION_IMAGES = 64


def build(folder: Path, home: str) -> None:
    """Writes the page into a folder, `home` being what its heading links to.

    Raises:
        ValueError: the folder isn't empty, or the runtime can't be fetched or isn't the one that was pinned.
        ImportError: scikit-image or a package for the export is missing.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files already; choose an empty folder")
    with tempfile.TemporaryDirectory() as scratch:
        fill(Path(scratch), home)
        shutil.copytree(scratch, folder, dirs_exist_ok=True)


def fill(folder: Path, home: str) -> None:
    for file in PAGE.iterdir():
        if file.suffix in (".html", ".css", ".js"):
            shutil.copy(file, folder)
    runtime = fetch_runtime(folder)
    photos = sample_photos()
    samples = write_samples(folder, photos)
    crops = calibration_crops(photos)
    networks = [row for name in MODELS for row in export(folder, f"{name}_cifar100", crops)]
    document = {
        "home": home,
        "size": 32,
        "classes": mz.CIFAR100_CLASSES,
        "runtime": runtime,
        "networks": networks,
        "pairs": [{"label": label, "files": files} for label, files in PAIRS.items()],
        "samples": samples,
    }
    write_json(folder / "networks.json", document)


def fetch_runtime(folder: Path) -> dict[str, Any]:
    """Unpacks ONNX Runtime's files beside the page."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--prefer-offline", "--pack-destination", scratch, RUNTIME]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("npm is missing, which fetches ONNX Runtime for the browser; install Node.js") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"npm can't fetch {RUNTIME}: {error.stderr.strip() or error}; try again") from None
        archive = next(Path(scratch).glob("*.tgz"))
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != RUNTIME_SHA512:
            raise ValueError(f"{RUNTIME} has the sha512 {digest}, not {RUNTIME_SHA512}; don't use it")
        rows: dict[str, Any] = {"version": RUNTIME.partition("@")[2]}
        with tarfile.open(archive) as tar:
            for backend, names in RUNTIME_FILES.items():
                rows[backend] = {}
                for kind, name in zip(("module", "glue", "wasm"), names, strict=True):
                    content = tar.extractfile(f"package/dist/{name}")
                    assert content is not None, name
                    (folder / name).write_bytes(content.read())
                    rows[backend][kind] = {"file": name, "bytes": (folder / name).stat().st_size}
    return rows


def sample_photos() -> dict[str, Image.Image]:
    from skimage import data
    from skimage.util import img_as_ubyte

    return {
        photo: Image.fromarray(img_as_ubyte(getattr(data, photo)())).convert("RGB")
        for photo in dict.fromkeys(photo for _, photo, _, _ in SAMPLES)
    }


def write_samples(folder: Path, photos: dict[str, Image.Image]) -> list[dict[str, str]]:
    rows = []
    for i, (name, photo, box, label) in enumerate(SAMPLES, 1):
        assert label is None or label in mz.CIFAR100_CLASSES, label
        picture = photos[photo].crop(box)
        picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        file = f"sample-{i:02}.jpg"
        picture.save(folder / file, quality=90)
        rows.append({"file": file, "name": name, "note": "" if label else ", which is none of the 100 classes"})
    return rows


def calibration_crops(photos: dict[str, Image.Image]) -> np.ndarray:
    """Returns random squares of the photos, uint8 (CALIBRATION_IMAGES, 32, 32, 3), always the same ones."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(CALIBRATION_IMAGES):
        photo = list(photos.values())[i % len(photos)]
        side = int(rng.uniform(0.3, 1.0) * min(photo.size))
        x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
        crops.append(np.asarray(photo.resize((32, 32), Image.Resampling.BICUBIC, (x, y, x + side, y + side))))
    return np.stack(crops)


def export(folder: Path, name: str, calibration: np.ndarray) -> list[dict[str, Any]]:
    """Writes a model's fastest fp32 and int8 forms; returns what the page says about them."""
    model = timm.create_model(name, pretrained=True).eval()
    rows = []
    for precision, images in (("fp32", None), ("int8", calibration)):
        network = mz.optimize_for_inference(model, dense=precision == "int8")
        short = name.removesuffix("_cifar100")
        file = folder / f"{short}-{precision}.onnx"
        mz.export_onnx(network, file, preprocessing=True, calibration_images=images)
        rows.append(
            {
                "name": short,
                "precision": precision,
                "file": file.name,
                "bytes": file.stat().st_size,
                "macs": mz.profile(network).macs,
                "top1": default_entry(name).top1,
            }
        )
        print(f"{file.name}: {rows[-1]['bytes']:,} bytes", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write, DOCS/demo where DOCS is the built documentation")
    args = parser.parse_args(argv)
    try:
        build(args.folder, home="../index.html")
    except (ValueError, OSError, ImportError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
