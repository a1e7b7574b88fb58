"""ONNX files: one self-contained file, dynamic batch, checked against PyTorch before it gets its name; int8 if wanted.

Needs the packages of `pip install 'mobilenets-zoo[onnx]'` and torch 2.6 or newer.
"""

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

import mobilenets_zoo
from mobilenets_zoo.data import ImageSet
from mobilenets_zoo.evaluation import per_channel, preprocess
from mobilenets_zoo.inference.optimize import FoldedConv2d
from mobilenets_zoo.inference.rewrites import as_convolution
from mobilenets_zoo.lgc.condense import REWRITTEN, TOLERANCES, check_equivalent, learned_layers
from mobilenets_zoo.profiling import input_size_of
from mobilenets_zoo.utils import atomic_write

__all__ = ["OnnxClassifier", "calibration_images", "export_onnx", "onnx_top1"]

CALIBRATION_BATCH = 64
EVALUATION_BATCH = 250

METADATA_KEYS = ("model", "version", "class_names", "mean", "std", "input_size", "interpolation")


class WithPreprocessing(nn.Module):
    """A classifier from uint8 images (N, H, W, C) to probabilities (N, num_classes)."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("offset", 255.0 * torch.tensor(mean)[:, None, None])
        self.register_buffer("scale", 1.0 / (255.0 * torch.tensor(std)[:, None, None]))
        self.offset: torch.Tensor
        self.scale: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).contiguous().to(self.scale.dtype)
        return self.model((pixels - self.offset) * self.scale).softmax(-1)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    preprocessing: bool = False,
    calibration_images: Optional[np.ndarray] = None,
    input_size: Optional[tuple[int, int, int]] = None,
) -> None:
    """Writes a classifier as one ONNX file with a dynamic batch size.

    The form of the model is kept: a masked learned group convolution becomes a dense one, a condensed one a gather and
    a grouped convolution. What `optimize_for_inference` returns is mostly the faster file; for int8, mostly what it
    returns with `dense=True` (docs/condensing.md has all forms and says where not). The file runs in ONNX Runtime, and
    its outputs are compared with the model's, before anything is written; the model stays as it was.

    Metadata: `class_names`, `mean`, `std`, `input_size` and `interpolation` as JSON, `model`, `version`.

    Args:
        model: a model of the zoo or any other classifier of images; it is exported in eval mode, in float32.
        path: the file to write or replace.
        preprocessing: take uint8 images (N, H, W, C), input "images", and put out probabilities "probabilities";
            else take normalised float32 images (N, C, H, W), "input", and put out "logits".
        calibration_images: uint8 (N, H, W, C), a few hundred training images: writes an int8 network (static
            quantisation, weights per channel and of seven bits, which overflow on no processor). Its outputs are not
            compared, measure its accuracy.
        input_size: (channels, height, width); by default the model's own, from its `pretrained_cfg`.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is missing, or torch is too old.
        ValueError: ONNX Runtime refuses the network, or its outputs differ there, a learned layer has hooks,
            the input size isn't known or doesn't fit the images, these aren't uint8, preprocessing or calibration needs
            a mean and a standard deviation that the model doesn't name, or probabilities are asked of fewer than two
            classes.
        OSError: the file can't be written.
    """
    _import_runtime()
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    size = input_size or input_size_of(model)
    classes = getattr(model, "num_classes", None)
    if preprocessing and classes in (0, 1):
        raise ValueError(f"probabilities need two classes or more, the model has {classes}; leave preprocessing out")
    if classes is not None and len(cfg.get("label_names") or ()) != classes:  # of the classes it once had
        cfg["label_names"] = None
    if size is None:
        raise ValueError(f"{type(model).__name__} names no input size; pass input_size=(channels, height, width)")
    channels, height, width = size
    if calibration_images is not None:
        given, kind = calibration_images.shape, calibration_images.dtype
        if given[1:] != (height, width, channels) or kind != np.uint8 or not len(calibration_images):
            raise ValueError(f"calibration_images must be uint8 (N, {height}, {width}, {channels}), not {kind} {given}")
    if (preprocessing or calibration_images is not None) and not {"mean", "std"} <= cfg.keys():
        raise ValueError(
            f"{type(model).__name__} names no mean and std to normalise with; set model.pretrained_cfg = "
            "{'mean': ..., 'std': ...}, as timm's models have it"
        )
    mean, std = (per_channel(cfg[key], channels) if key in cfg else () for key in ("mean", "std"))

    # A masked layer becomes a dense convolution with zeros where its mask is False.
    dense = {id(layer): FoldedConv2d(as_convolution(layer), act=False) for layer in learned_layers(model).values()}
    network: nn.Module = copy.deepcopy(model, memo=dict(dense)).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it was
    if preprocessing:
        network = WithPreprocessing(network, mean, std)
        sample = torch.randint(256, (3, height, width, channels), dtype=torch.uint8, generator=generator)
    else:
        sample = torch.randn(3, channels, height, width, generator=generator)
    data = _onnx_bytes(network, sample[:2], preprocessing, _metadata(cfg, size, mean, std))
    if calibration_images is not None:
        feeds = calibration_images if preprocessing else _normalised(calibration_images, mean, std)
        with tempfile.TemporaryDirectory() as folder:
            data = _quantized(data, Path(folder), feeds)
    # An int8 network's values are its own, but as many as the model's and finite.
    exact = REWRITTEN * TOLERANCES[torch.float32]
    tolerance = exact if calibration_images is None else sys.float_info.max
    try:
        exported = OnnxClassifier(data)
        batches = [sample[:1], sample]
        outputs = [torch.from_numpy(exported(batch.numpy())) for batch in batches]
    except Exception as error:  # ONNX Runtime's have no class in common but this
        raise ValueError(f"ONNX Runtime refuses {type(model).__name__}: {error}") from error
    for batch, output in zip(batches, outputs, strict=True):
        check_equivalent(network, lambda _, output=output: output, batch, tolerance)
    with atomic_write(path) as file:
        file.write(data)


class OnnxClassifier:
    """Runs an exported file as a function of normalised images or, where the file says so, of uint8 ones.

    Args:
        source: a file that `export_onnx` wrote, or its content.
        threads: of ONNX Runtime, 0 for one per core.

    Attributes:
        metadata: the file's metadata, JSON values decoded.
        preprocessing: whether the file takes uint8 images (N, H, W, C).
    """

    def __init__(self, source: str | Path | bytes, threads: int = 0):
        runtime = _import_runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        model = source if isinstance(source, bytes) else str(source)
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        stored = self.session.get_modelmeta().custom_metadata_map
        self.metadata = {key: json.loads(value) for key, value in stored.items() if key in METADATA_KEYS}
        self.input = self.session.get_inputs()[0]
        self.preprocessing = self.input.type == "tensor(uint8)"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns (N, num_classes): probabilities with preprocessing inside, else logits."""
        return self.session.run(None, {self.input.name: images})[0]


def calibration_images(train: ImageSet, count: int = 512) -> np.ndarray:
    """Returns training images to calibrate with, uint8 (count, H, W, C), always the same ones."""
    chosen = np.random.default_rng(0).choice(len(train), min(count, len(train)), replace=False)
    return train.images[np.sort(chosen)]


def onnx_top1(
    classifier: OnnxClassifier, images: ImageSet, on_progress: Optional[Callable[[int], object]] = None
) -> float:
    """Returns the top-1 accuracy of an exported file, in per cent."""
    correct = 0
    for i in range(0, len(images), EVALUATION_BATCH):
        batch = images.images[i : i + EVALUATION_BATCH]
        if not classifier.preprocessing:
            batch = _normalised(batch, classifier.metadata["mean"], classifier.metadata["std"])
        correct += int((classifier(batch).argmax(1) == images.labels[i : i + EVALUATION_BATCH]).sum())
        if on_progress:
            on_progress(i + len(batch))
    return 100.0 * correct / len(images)


def _import_runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing; run pip install 'mobilenets-zoo[onnx]'") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(f"ONNX export needs torch 2.6 or newer, this is {torch.__version__}")
    return onnxruntime


def _normalised(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return preprocess(torch.from_numpy(images), mean, std).contiguous().numpy()


def _onnx_bytes(network: nn.Module, sample: torch.Tensor, preprocessing: bool, metadata: dict[str, str]) -> bytes:
    import onnx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (sample,),
            dynamo=True,
            input_names=["images" if preprocessing else "input"],
            output_names=["probabilities" if preprocessing else "logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            verbose=False,
        )
    assert program is not None
    content = program.model_proto
    onnx.helper.set_model_props(content, metadata)
    return content.SerializeToString()


def _metadata(cfg: dict[str, Any], size: Any, mean: Any, std: Any) -> dict[str, str]:
    values = {
        "model": ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))),
        "version": mobilenets_zoo.__version__,
        "class_names": cfg.get("label_names"),
        "mean": mean,
        "std": std,
        "input_size": size,
        "interpolation": cfg.get("interpolation"),
    }
    return {key: json.dumps(values[key]) for key in METADATA_KEYS}


def _quantized(data: bytes, folder: Path, feeds: np.ndarray) -> bytes:
    """Returns the network with int8 convolutions and classifier, quantised statically."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, folded, result = (folder / f"{name}.onnx" for name in ("source", "folded", "int8"))
    source.write_bytes(data)
    quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)  # folds BatchNorm
    name = onnx.load(str(folded)).graph.input[0].name
    batches = iter(feeds[i : i + CALIBRATION_BATCH] for i in range(0, len(feeds), CALIBRATION_BATCH))

    class Reader(CalibrationDataReader):
        def get_next(self) -> Optional[dict[str, np.ndarray]]:
            batch = next(batches, None)
            return None if batch is None else {name: batch}

    quantize_static(
        str(folded),
        str(result),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Clip", "GlobalAveragePool", "Gather"],
        per_channel=True,
        reduce_range=True,  # else sums of two products overflow 16 bits on x86 processors without VNNI
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return result.read_bytes()
