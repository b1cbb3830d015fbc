"""Networks in the manner of VGG (Simonyan & Zisserman 2015): rows of 3x3 convolutions, halved by pooling.

Legend: N images, C channels, H height, W width.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.anatomy import VGG_STAGES
from bnscale.networks.norm import rectified


class Layer(nn.Module):
    """relu(norm(conv(x))); the convolution has a bias, as in Frankle's code."""

    def __init__(self, name: str, inputs: int, channels: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        self.norm = norm(f"{name}.norm")
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return rectified(self.norm, self.relu, self.conv(x_NCHW))


class Halve(nn.Module):
    """The largest of each 2x2 pixels; maps of one pixel, which small images come down to, stay."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.max_pool2d(x_NCHW, 2) if x_NCHW.shape[-1] > 1 else x_NCHW


class VGG(nn.Module):
    """VGG-11, -13, -16 or -19 as in Frankle's code (open_lth, models/cifar_vgg.py): there 64 channels, `width` 4.

    Of the three linear layers in their names one is left, so VGG-16 has 13 convolutions: `layers.1` to `layers.13`,
    numbered as the papers do. Logits (N, classes).
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs, number = channels, 0
        for stage, convolutions in enumerate(VGG_STAGES[depth]):
            outputs = 16 * width * min(2**stage, 8)
            for _ in range(convolutions):
                number += 1
                layers[str(number)] = Layer(f"layers.{number}", inputs, outputs, norm)
                inputs = outputs
            if stage < len(VGG_STAGES[depth]) - 1:
                layers[f"halve{stage + 1}"] = Halve()
        self.layers = nn.Sequential(layers)
        self.head_norm = norm("head_norm")
        self.output = nn.Linear(inputs, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x_NCHW = self.layers(images_NCHW)
        return self.output(self.head_norm(F.avg_pool2d(x_NCHW, x_NCHW.shape[-1]).flatten(1)))


class Pair(nn.Module):
    """Two convolutions with a skip around them: lrelu(norm(conv(lrelu(norm(conv(x))))) + x)."""

    def __init__(self, name: str, channels: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = norm(f"{name}.norm1")
        self.relu1 = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(f"{name}.norm2")
        self.relu2 = nn.LeakyReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.relu1(self.norm1(self.conv1(x_NCHW)))
        return self.relu2(self.norm2(self.conv2(y_NCHW)).add_(x_NCHW))


class Reduction(Pair):
    """The end of a stage: the same two convolutions with a mean over 2x2 pixels between them, and no skip."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.relu1(self.norm1(self.conv1(x_NCHW)))
        if y_NCHW.shape[-1] > 1:  # maps of one pixel, which small images come down to, stay
            y_NCHW = F.avg_pool2d(y_NCHW, 2)
        return self.relu2(self.norm2(self.conv2(y_NCHW)))


class ResidualVGG(nn.Module):
    """The interim report's VGG-38 with residual connections, and its like of 6n+2 layers.

    One convolution, then three stages of n blocks of two convolutions, all of one width (32 channels in the course that
    the report comes from: `width` 2), leaky ReLU, mean pooling in the last block of each stage. The skips go around the
    blocks that do not pool. Logits (N, classes).
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(channels, 16 * width, 3, padding=1, bias=False)
        self.norm = norm("norm")
        self.relu = nn.LeakyReLU(inplace=True)
        stage = [*[Pair] * (blocks - 1), Reduction]
        self.blocks = nn.Sequential(
            *(block(f"blocks.{number}", 16 * width, norm) for number, block in enumerate(3 * stage))
        )
        self.head_norm = norm("head_norm")
        self.output = nn.Linear(16 * width, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x_NCHW = self.blocks(self.relu(self.norm(self.conv(images_NCHW))))
        return self.output(self.head_norm(F.avg_pool2d(x_NCHW, x_NCHW.shape[-1]).flatten(1)))
