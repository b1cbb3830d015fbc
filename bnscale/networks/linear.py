"""Deep linear networks: products of matrices, with a norm between them or none.

Santurkar et al. 2018, section 3.1: 25 matrices of 10 by 10. Bjorck et al. 2018, section 4: M Gaussian matrices of N by
N, which is the same family without norms at its initialisation. Legend: N vectors, K dimensions.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn


class Layer(nn.Module):
    """norm(W x), without a bias."""

    def __init__(self, name: str, inputs: int, outputs: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = norm(f"{name}.norm")

    def forward(self, x_NK: Tensor) -> Tensor:
        return self.norm(self.linear(x_NK))


class Linear(nn.Module):
    """W_depth ... W_2 W_1 x: `depth` matrices, all `width` by `width` where inputs and outputs are as many."""

    def __init__(self, depth: int, width: int, inputs: int, outputs: int, norm: Callable[[str], nn.Module]) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, depth):
            layers[str(number)] = Layer(f"layers.{number}", inputs, width, norm)
            inputs = width
        self.layers = nn.Sequential(layers)
        self.output = nn.Linear(inputs, outputs, bias=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.output(self.layers(images_NCHW.flatten(1)))
