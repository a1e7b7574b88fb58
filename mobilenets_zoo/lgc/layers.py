"""Learned group convolution (LGC): the masked layer that trains and the condensed layer that is deployed.

Paper: CondenseNet: An Efficient DenseNet using Learned Group Convolutions, section 3
(https://arxiv.org/abs/1711.09224).
Output groups are contiguous blocks of channels here, so the condensed layer needs no channel shuffle behind it.

Notation: G groups, C condense factor, K = in_channels / C inputs that a finished group reads, O = out_channels / G
output channels in a group.
"""

import math

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.lgc import gather

__all__ = ["CondensedConv2d", "LearnedGroupConv2d", "condense_weight", "expand_weight"]


class _GroupConv2d(nn.Module):
    """What the masked and the condensed layer share: sizes, weight and bias. Args: as for `LearnedGroupConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 4,
        condense_factor: int = 4,
        device=None,
        dtype=None,
        *,
        stride: int | tuple[int, ...] = 1,
        bias: bool = False,
    ):
        super().__init__()
        if min(in_channels, out_channels, groups, condense_factor) < 1:
            raise ValueError("in_channels, out_channels, groups and condense_factor must be at least 1")
        if in_channels % condense_factor:
            raise ValueError(f"in_channels {in_channels} isn't a multiple of condense_factor {condense_factor}")
        if out_channels % groups:
            raise ValueError(f"out_channels {out_channels} isn't a multiple of groups {groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.condense_factor = condense_factor
        # As in nn.Conv2d, for code that computes a padding from them.
        self.kernel_size, self.stride, self.padding, self.dilation = (1, 1), to_2tuple(stride), (0, 0), (1, 1)
        inputs, self.fan_out = self._register_choice(device)
        self.weight = nn.Parameter(torch.empty(out_channels, inputs, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _register_choice(self, device) -> tuple[int, int]:
        """Registers the buffer that says which inputs a group reads.

        Returns:
            How many inputs a row of the weight holds, and how many outputs read one input, for the initial weights.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """He initialisation by fan-out, zero bias. Leaves mask and index alone."""
        nn.init.normal_(self.weight, 0.0, math.sqrt(2.0 / self.fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, groups={self.groups}, condense_factor={self.condense_factor}"
        text += f", stride={self.stride}" if self.stride != (1, 1) else ""
        return text if self.bias is None else text + ", bias=True"


class LearnedGroupConv2d(_GroupConv2d):
    """A 1x1 convolution in which each group of outputs learns which inputs it reads.

    The weight stays dense and is multiplied by the mask in `forward`; the mask changes in `prune_` and `prune_groups`.

    Args:
        in_channels: input channels, a multiple of `condense_factor`.
        out_channels: output channels, a multiple of `groups`.
        groups: number of output groups (G), contiguous blocks of output channels.
        condense_factor: a finished group reads in_channels / condense_factor inputs (C).
        stride: along both axes, or (vertical, horizontal).
        bias: whether a bias is added; the zoo's layers have none, BatchNorm follows them.

    Attributes:
        weight: (out_channels, in_channels, 1, 1).
        bias: (out_channels,) or None.
        mask: bool buffer (groups, in_channels), True where the group reads the input.

    Raises:
        ValueError: channels that don't divide, or a count below 1.
    """

    def _register_choice(self, device) -> tuple[int, int]:
        self.register_buffer("mask", torch.ones(self.groups, self.in_channels, device=device, dtype=torch.bool))
        self.mask: torch.Tensor
        return self.in_channels, self.out_channels

    def masked_weight(self) -> torch.Tensor:
        """Returns the weight, (out_channels, in_channels, 1, 1), with zeros where a group reads no input."""
        mask = self.mask.to(self.weight.dtype).unsqueeze(1)
        grouped = self.weight.reshape(self.groups, self.out_channels // self.groups, self.in_channels)
        return (grouped * mask).reshape(self.out_channels, self.in_channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        return F.conv2d(x, self.masked_weight(), self.bias, self.stride)

    @torch.no_grad()
    def input_importance(self) -> torch.Tensor:
        """Returns the importance of each input for each group, the sum of absolute weights in the group's rows.

        Shape (groups, in_channels), zero at dropped inputs (CondenseNet, section 3.1).
        """
        return self.masked_weight().abs().reshape(self.groups, -1, self.in_channels).sum(1)

    @torch.no_grad()
    def prune_(self, inputs_per_group: int) -> "LearnedGroupConv2d":
        """Drops each group's least important inputs, in place, until it holds `inputs_per_group`.

        A dropped input never returns: a group that holds fewer already stays as it is. Of inputs with equal
        importance the one with the lower index is kept, so equal weights give equal masks.

        Raises:
            ValueError: `inputs_per_group` outside 1...in_channels, or a weight that isn't finite.
        """
        if not 1 <= inputs_per_group <= self.in_channels:
            raise ValueError(f"inputs_per_group must be in 1...{self.in_channels}, not {inputs_per_group}")
        importance = self.input_importance()
        if not torch.isfinite(importance).all():
            raise ValueError("can't prune by importance: the weight holds values that are not finite")
        # The mask itself decides what is dropped: a kept input may well have an importance of zero.
        importance = importance.masked_fill(~self.mask, -1.0)
        order = importance.argsort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(self.mask).scatter_(1, order[:, :inputs_per_group], True)
        self.mask &= chosen
        return self

    def group_lasso(self) -> torch.Tensor:
        """Returns the group lasso: the sum over (group, input) of the L2 norm of the masked block's weights.

        A scalar with gradient (CondenseNet, section 3.2).
        """
        blocks = self.masked_weight().reshape(self.groups, -1, self.in_channels)
        return torch.linalg.vector_norm(blocks, dim=1).sum()

    def hoyer_index(self) -> torch.Tensor:
        """Returns the Hoyer index of each group's input importances, shape (groups,).

        (sqrt(N) - L1 / L2) / (sqrt(N) - 1) over all N = in_channels inputs, dropped ones counting as zero: 1 where
        one input carries everything, 0 where all are equal (Hoyer, JMLR 5, 2004, equation for sparseness).
        """
        importance = self.input_importance()
        root = math.sqrt(self.in_channels)
        if root == 1.0:
            return torch.zeros_like(importance[:, 0])
        l1 = importance.sum(1)
        l2 = torch.linalg.vector_norm(importance, dim=1)
        ratio = torch.where(l2 > 0, l1 / l2, torch.full_like(l2, root))
        return ((root - ratio) / (root - 1.0)).clamp(0.0, 1.0)

    def condense(self) -> "CondensedConv2d":
        """Returns a new layer with equal outputs that stores and computes the kept weights alone.

        Device, dtype, training flag and requires_grad carry over.

        Raises:
            ValueError: a group doesn't hold exactly in_channels / condense_factor inputs, or the layer has hooks, which
                the new one wouldn't have.
        """
        if has_hooks(self):
            raise ValueError("can't condense a layer with hooks, which would be lost: remove them first")
        weight, index = condense_weight(self.weight.detach(), self.mask, self.condense_factor)
        sizes = (self.in_channels, self.out_channels, self.groups, self.condense_factor)
        # All tensors are replaced, so that none need be drawn.
        layer = CondensedConv2d(*sizes, device="meta", stride=self.stride, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        layer.index = index
        return layer.train(self.training)

    fuse = condense  # the name that timm.utils.reparameterize_model looks for


class CondensedConv2d(_GroupConv2d):
    """The deployed form of `LearnedGroupConv2d`: a channel gather and a standard grouped 1x1 convolution.

    Args: as for `LearnedGroupConv2d`.

    Attributes:
        weight: (out_channels, in_channels / condense_factor, 1, 1), as in a grouped `nn.Conv2d`.
        index: int64 buffer (groups * in_channels / condense_factor,), the inputs that each group reads.
        bias: (out_channels,) or None.

    Raises:
        ValueError: channels that don't divide, or a count below 1.
    """

    def _register_choice(self, device) -> tuple[int, int]:
        inputs = self.in_channels // self.condense_factor
        # Until a checkpoint says otherwise, the groups take turns at consecutive inputs.
        self.register_buffer("index", torch.arange(self.groups * inputs, device=device) % self.in_channels)
        self.index: torch.Tensor
        return inputs, self.out_channels // self.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        if self.stride != (1, 1):
            x = x[..., :: self.stride[0], :: self.stride[1]]
        x = gather.condensed_conv2d(x, self.weight, self.index, self.groups)
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]  # another one under autocast

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        index = state_dict.get(prefix + "index")
        if index is not None and index.shape == self.index.shape:
            try:
                _check_index(index, self.groups, self.in_channels)
            except ValueError as error:
                errors.append(f"{prefix}index: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with a module's inputs, outputs or gradients, which a module in its place loses."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def condense_weight(
    weight: torch.Tensor, mask: torch.Tensor, condense_factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the condensed layer's weight and index.

    Args:
        weight: (out_channels, in_channels, 1, 1).
        mask: (groups, in_channels), bool.
        condense_factor: C.

    Returns:
        Weight (out_channels, K, 1, 1) and int64 index (groups * K,), ascending within each group.

    Raises:
        ValueError: a group doesn't hold exactly in_channels / C inputs; the message lists the counts.
    """
    groups, in_channels = mask.shape
    expected = in_channels // condense_factor
    counts = mask.sum(1).tolist()
    if in_channels % condense_factor or any(count != expected for count in counts):
        raise ValueError(
            f"can't condense: the {groups} groups hold {counts} of {in_channels} inputs and each must hold exactly "
            f"{in_channels}/{condense_factor}; finish the CondenseSchedule or call prune_({expected})"
        )
    index = mask.nonzero()[:, 1]
    columns = index.reshape(groups, 1, expected).expand(-1, weight.shape[0] // groups, -1)
    grouped = weight.reshape(groups, -1, in_channels)
    return grouped.gather(2, columns).reshape(-1, expected, 1, 1), index


def expand_weight(
    weight: torch.Tensor, index: torch.Tensor, groups: int, in_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the masked layer's weight and mask, the inverse of `condense_weight`.

    Args:
        weight: (out_channels, K, 1, 1).
        index: (groups * K,), int64.
        groups: G.
        in_channels: channels of the masked layer's input.

    Returns:
        Weight (out_channels, in_channels, 1, 1), zero where the mask is False, and bool mask (groups, in_channels).

    Raises:
        ValueError: the index doesn't fit.
    """
    _check_index(index, groups, in_channels)
    inputs = index.reshape(groups, -1)
    mask = torch.zeros(groups, in_channels, dtype=torch.bool, device=weight.device).scatter_(1, inputs, True)
    grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
    columns = inputs.unsqueeze(1).expand_as(grouped)
    dense = grouped.new_zeros(groups, grouped.shape[1], in_channels).scatter_(2, columns, grouped)
    return dense.reshape(-1, in_channels, 1, 1), mask


def _check_index(index: torch.Tensor, groups: int, in_channels: int) -> None:
    """Raises ValueError unless every group names distinct channels in range."""
    if index.is_meta:
        return
    if index.is_floating_point() or index.numel() % groups:
        raise ValueError(f"expected {groups} equally long rows of integers, got {index.dtype} {tuple(index.shape)}")
    if index.numel() and (index.min() < 0 or index.max() >= in_channels):
        raise ValueError(f"names channels outside 0...{in_channels - 1}")
    rows = index.reshape(groups, -1).sort(1).values
    if (rows[:, 1:] == rows[:, :-1]).any():
        raise ValueError("a group names a channel twice")
