"""Small, fast CIFAR-100 networks for timm. Importing the package registers the models.

import timm, mobilenets_zoo
model = timm.create_model("mobilenetv1_w025_cifar100", pretrained=True)
"""

from mobilenets_zoo import catalogue, data, evaluation, models, pretrained, profiling, utils
from mobilenets_zoo.data import CIFAR100_CLASSES
from mobilenets_zoo.inference import onnx
from mobilenets_zoo.inference.onnx import OnnxClassifier, export_onnx
from mobilenets_zoo.inference.optimize import optimize_for_inference
from mobilenets_zoo.lgc.condense import check_equivalent, condense, learned_layers
from mobilenets_zoo.lgc.convert import ConversionReport, to_learned_group_conv
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d
from mobilenets_zoo.lgc.pruning import LayerPruning, PruningReport, prune_groups
from mobilenets_zoo.lgc.schedule import CondenseSchedule, group_lasso
from mobilenets_zoo.models import MobileNetV1, MobileNetV2
from mobilenets_zoo.pretrained import WeightsError, manifest, save_weights
from mobilenets_zoo.profiling import Profile, profile

__version__ = "0.1.0"

__all__ = [
    "CIFAR100_CLASSES",
    "CondenseSchedule",
    "CondensedConv2d",
    "ConversionReport",
    "LayerPruning",
    "LearnedGroupConv2d",
    "MobileNetV1",
    "MobileNetV2",
    "OnnxClassifier",
    "Profile",
    "PruningReport",
    "WeightsError",
    "catalogue",
    "check_equivalent",
    "condense",
    "data",
    "evaluation",
    "export_onnx",
    "group_lasso",
    "learned_layers",
    "manifest",
    "models",
    "onnx",
    "optimize_for_inference",
    "pretrained",
    "profile",
    "profiling",
    "prune_groups",
    "save_weights",
    "to_learned_group_conv",
    "utils",
]
