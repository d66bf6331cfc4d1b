"""Convolutional block attention module (CBAM), Woo et al., ECCV 2018, arXiv:1807.06521."""

import torch
from torch import nn

__all__ = ["CBAM", "GATE_SCALE", "ChannelGate", "SpatialGate"]


# Name of a gate -> factor on the sigmoid. Twice the sigmoid is 1 at zero, so that a gate whose last
# layer is zero passes its input on unchanged. "residual" adds what the gates let through.
GATE_SCALE = {"sigmoid": 1.0, "double_sigmoid": 2.0, "residual": 1.0}


def _gate_scale(gate):
    if gate not in GATE_SCALE:
        raise ValueError(f"MODEL.CBAM.GATE is {gate!r}; use one of {sorted(GATE_SCALE)}")
    return GATE_SCALE[gate]


class ChannelGate(nn.Module):
    """
    A weight for each channel: ``s * sigmoid(MLP(avgpool x) + MLP(maxpool x))`` (eq. 2).
    """

    def __init__(self, channels, reduction=16, gate="double_sigmoid"):
        """
        Args:
            channels (int): channels of the input.
            reduction (int): the hidden layer has ``channels // reduction`` units, at least one.
            gate (str): "sigmoid", "residual" (s = 1) or "double_sigmoid" (s = 2).
        """
        super().__init__()
        if reduction < 1:
            raise ValueError(f"MODEL.CBAM.REDUCTION is {reduction}; it must be at least 1")
        self.scale = _gate_scale(gate)
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x):
        """
        Args:
            x (Tensor): (N, C, H, W).

        Returns:
            Tensor: (N, C, 1, 1), from 0 to s.
        """
        logits = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        return (self.scale * torch.sigmoid(logits))[:, :, None, None]


class SpatialGate(nn.Module):
    """
    A weight for each position: ``s * sigmoid(conv([mean_c x ; max_c x]))`` (eq. 3).
    """

    def __init__(self, kernel_size=7, gate="double_sigmoid"):
        """
        Args:
            kernel_size (int): of the convolution; odd.
            gate (str): "sigmoid", "residual" (s = 1) or "double_sigmoid" (s = 2).
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"MODEL.CBAM.KERNEL_SIZE is {kernel_size}; it must be odd")
        self.scale = _gate_scale(gate)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x):
        """
        Args:
            x (Tensor): (N, C, H, W).

        Returns:
            Tensor: (N, 1, H, W), from 0 to s.
        """
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.scale * torch.sigmoid(self.conv(pooled))


class CBAM(nn.Module):
    """
    Multiply by the channel gate, then by the spatial gate of the product (eq. 1).
    """

    def __init__(self, channels, reduction=16, kernel_size=7, gate="double_sigmoid"):
        """
        Args:
            channels (int): channels of the input.
            reduction (int): of the channel gate's MLP.
            kernel_size (int): of the spatial gate's convolution; odd.
            gate (str): "sigmoid" is the paper's; "double_sigmoid" equals 1 where its input is 0;
                "residual" adds the input to what the paper's gates let through.

        Raises:
            ValueError: for an unknown gate, an even kernel size or a reduction below 1.
        """
        super().__init__()
        self.channel = ChannelGate(channels, reduction, gate)
        self.spatial = SpatialGate(kernel_size, gate)
        self.residual = gate == "residual"

    def init_identity(self):
        """
        Zero the last layer of each gate: with gate "double_sigmoid" this is then the identity.
        """
        nn.init.zeros_(self.channel.mlp[-1].weight)
        nn.init.zeros_(self.spatial.conv.weight)

    def forward(self, x):
        """
        Args:
            x (Tensor): (N, C, H, W).

        Returns:
            Tensor: (N, C, H, W).
        """
        gated = x * self.channel(x)
        gate = self.spatial(gated)
        # Fresh memory for another map of its size would cost more than the product; only autograd
        # needs both.
        gated = gated * gate if torch.is_grad_enabled() else gated.mul_(gate)
        return x + gated if self.residual else gated
