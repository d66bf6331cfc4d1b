"""Convolutional block attention module (CBAM), Woo et al., ECCV 2018, arXiv:1807.06521."""

import torch
from torch import nn

# Factor on the sigmoid. Twice the sigmoid is 1 at zero, so that a gate whose last layer is zero
# passes its input on unchanged. "residual" is for weights of version 0.1.0, see `CBAM`.
GATE_SCALE = {"sigmoid": 1.0, "double_sigmoid": 2.0, "residual": 1.0}


class ChannelGate(nn.Module):
    """``scale * sigmoid(MLP(avgpool x) + MLP(maxpool x))`` (eq. 2)."""

    def __init__(self, channels: int, reduction: int, scale: float):
        super().__init__()
        self.scale = scale
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x: torch.Tensor):
        """Return (N, C, 1, 1) for (N, C, H, W)."""
        logits = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        return (self.scale * torch.sigmoid(logits))[:, :, None, None]


class SpatialGate(nn.Module):
    """``scale * sigmoid(conv([mean_c x ; max_c x]))`` (eq. 3)."""

    def __init__(self, kernel_size: int, scale: float):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor):
        """Return (N, 1, H, W) for (N, C, H, W)."""
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.scale * torch.sigmoid(self.conv(pooled))


class CBAM(nn.Module):
    """Multiply by the channel gate, then by the spatial gate of the product (eq. 1)."""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        gate: str = "sigmoid",
    ):
        """
        Args:
            reduction: the channel gate's MLP has channels // reduction hidden units, at least 1.
            kernel_size: of the spatial gate's convolution; odd.
            gate: "sigmoid" is the paper's; "double_sigmoid" equals 1 where its input is 0. Version
                0.1.0 had "residual" too: the input is added to the output of the paper's gates.

        Raises:
            ValueError: for an unknown gate, an even kernel size or a reduction below 1.
        """
        super().__init__()
        if gate not in GATE_SCALE:
            raise ValueError(f"MODEL.CBAM.GATE is {gate!r}; use 'sigmoid' or 'double_sigmoid'")
        if reduction < 1:
            raise ValueError(f"MODEL.CBAM.REDUCTION is {reduction}; it must be at least 1")
        if kernel_size % 2 == 0:
            raise ValueError(f"MODEL.CBAM.KERNEL_SIZE is {kernel_size}; it must be odd")
        self.channel = ChannelGate(channels, reduction, GATE_SCALE[gate])
        self.spatial = SpatialGate(kernel_size, GATE_SCALE[gate])
        self.residual = gate == "residual"

    def init_identity(self) -> None:
        """Zero the last layer of each gate: with gate "double_sigmoid" it is then the identity."""
        nn.init.zeros_(self.channel.mlp[-1].weight)
        nn.init.zeros_(self.spatial.conv.weight)

    def forward(self, x: torch.Tensor):
        """Return the refined map, of the same shape (N, C, H, W)."""
        gated = x * self.channel(x)
        gate = self.spatial(gated)
        # Fresh memory for another map of its size would cost more than the product; only autograd
        # needs both.
        gated = gated * gate if torch.is_grad_enabled() else gated.mul_(gate)
        return x + gated if self.residual else gated
