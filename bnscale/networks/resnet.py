"""The CIFAR ResNet: 6n+2 layers in three stages of n blocks, as in Frankle's code.

He et al. 2016, section 4.2, with a 1x1 convolution and a norm on the shortcut where the stage
changes (open_lth, models/cifar_resnet.py). Legend: N images, C channels, H height, W width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.networks import chain
from bnscale.networks.norm import begun, rectified, shared, summed


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)): post-activation, two layers."""

    def __init__(self, name: str, inputs: int, channels: int, stride: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(f"{name}.norm1")
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(f"{name}.norm2")
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != channels:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("conv", nn.Conv2d(inputs, channels, 1, stride, bias=False))
            self.shortcut.add_module("norm", norm(f"{name}.shortcut.norm"))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if chain.links(self, x_NCHW):
            return chain.chained([self], x_NCHW)
        if isinstance(self.shortcut, nn.Sequential) and shared(self.norm1, self.norm2, self.shortcut[1]):
            return self._on_a_gang(x_NCHW, *self.shortcut)
        y_NCHW = rectified(self.norm1, self.relu1, self.conv1(x_NCHW))
        return rectified(self.norm2, self.relu2, self.conv2(y_NCHW), lambda: self.shortcut(x_NCHW))

    def _on_a_gang(self, x_NCHW: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        """The same, while and so that less is waited for: the shortcut's convolution is computed while the first norm's
        statistics travel, and its norm's travel with the second's. Elsewhere each operation needs the one before."""
        first = begun(self.norm1, self.conv1(x_NCHW))
        shortcut_NCHW = conv(x_NCHW)
        y_NCHW = self.conv2(self.relu1(first()))
        return self.relu2(summed([self.norm2, norm], [y_NCHW, shortcut_NCHW]))


def through(blocks: nn.Sequential, x_NCHW: Tensor) -> Tensor:
    """blocks(x), where neighbours that can are one operation."""
    if chain.changed(blocks):
        return blocks(x_NCHW)
    waiting: list[Block] = []
    for block in blocks:
        link = block if type(block) is Block and not chain.changed(block) and chain.links(block, x_NCHW) else None
        if waiting and not (link and link.norm1.training == waiting[0].norm1.training):
            x_NCHW, waiting = chain.chained(waiting, x_NCHW), []
        if link:
            waiting.append(link)  # which leaves the shape of x as it is
        else:
            x_NCHW = block(x_NCHW)
    return chain.chained(waiting, x_NCHW)


class ResNet(nn.Module):
    """`depth` = 6n+2 layers; stages of 16, 32 and 64 channels times `width`; logits (N, classes).

    `norm` gives what stands at each site, by its name (anatomy.py).
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        stage, rest = divmod(depth - 2, 6)
        assert not rest, "Trial refuses other depths"
        inputs = 16 * width
        self.conv = nn.Conv2d(channels, inputs, 3, padding=1, bias=False)
        self.norm = norm("norm")
        self.relu = nn.ReLU(inplace=True)
        blocks: list[Block] = []
        for number, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range(stage):
                stride = 2 if number > 0 and place == 0 else 1
                blocks.append(Block(f"blocks.{len(blocks)}", inputs, outputs, stride, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head_norm = norm("head_norm")
        self.output = nn.Linear(inputs, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x_NCHW = through(self.blocks, rectified(self.norm, self.relu, self.conv(images_NCHW)))
        return self.output(self.head_norm(F.avg_pool2d(x_NCHW, x_NCHW.shape[-1]).flatten(1)))
