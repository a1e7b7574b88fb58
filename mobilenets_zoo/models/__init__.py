"""The model families; importing this package registers them with timm."""

from mobilenets_zoo.models.mobilenetv1 import MobileNetV1
from mobilenets_zoo.models.mobilenetv2 import MobileNetV2

__all__ = ["MobileNetV1", "MobileNetV2"]
