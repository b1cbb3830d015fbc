"""ResNets for ImageNet: torchvision's own, with our norms put in.

He et al. 2016, table 1; 200 layers as in Frankle's code (open_lth, models/imagenet_resnet.py). The only import of
torchvision's models: it takes seconds, and no other family pays them. Legend: N images, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnscale.anatomy import IMAGENET_STAGES


class ImageNetResNet(nn.Module):
    """18, 34, 50, 101, 152 or 200 layers; `body` is torchvision's network without its classifier. Logits (N, classes).

    Images of any size serve: five times their side is halved.
    """

    def __init__(self, depth: int, channels: int, classes: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        block: Any = BasicBlock if depth < 50 else Bottleneck
        self.body = ResNet(block, list(IMAGENET_STAGES[depth]), norm_layer=_Site)
        for name, module in list(self.named_modules()):
            if isinstance(module, _Site):
                parent, _, own = name.rpartition(".")
                setattr(self.get_submodule(parent), own, norm(name))
        if channels != 3:
            self.body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        inputs = self.body.fc.in_features
        self.body.fc = nn.Identity()
        self.head_norm = norm("head_norm")
        self.output = nn.Linear(inputs, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.output(self.head_norm(self.body(images_NCHW)))


class _Site(nn.Module):
    """Where torchvision would put a norm; it tells the channels and not the name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
