"""Knowledge distillation: frozen teachers and the loss that compares a student with them."""

import timm
import torch
from torch import nn
from torch.nn import functional as F
from weight_files import create_from_file

__all__ = ["Teachers", "distillation_loss"]


class Teachers(nn.Module):
    """An ensemble of frozen networks.

    Args:
        names: zoo or timm names (with their pretrained weights), or "NAME=FILE.safetensors".
        num_classes: classes that every teacher must have.

    Raises:
        ValueError: a weight can't be loaded or has other classes.
    """

    def __init__(self, names: tuple[str, ...], num_classes: int):
        super().__init__()
        self.models = nn.ModuleList()
        for entry in names:
            name, _, file = entry.partition("=")
            try:
                model = create_from_file(name, file) if file else timm.create_model(name, pretrained=True)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"teacher {entry}: {error}") from error
            if model.num_classes != num_classes:
                raise ValueError(f"teacher {entry} has {model.num_classes} classes, the data has {num_classes}")
            self.models.append(model)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images to logits (teachers, N, classes), float32."""
        return torch.stack([model(images).float() for model in self.models])


def distillation_loss(
    student: torch.Tensor, teachers: torch.Tensor, temperature: float, standardize: bool
) -> torch.Tensor:
    """Returns T^2 times KL(teachers' mean distribution || student), averaged over the batch.

    Args:
        student: logits, (N, classes).
        teachers: logits, (teachers, N, classes).
        temperature: T of Hinton et al. (arXiv 1503.02531), section 2.
        standardize: compare z-scores of the logits (Logit Standardization in Knowledge Distillation,
            arXiv 2403.01427).
    """
    if standardize:
        student, teachers = _z_score(student), _z_score(teachers)
    log_student = F.log_softmax(student / temperature, dim=-1)
    target = F.softmax(teachers / temperature, dim=-1).mean(0)
    return temperature**2 * F.kl_div(log_student, target, reduction="batchmean")


def _z_score(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)
