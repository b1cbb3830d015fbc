"""What a network consists of before it is built: arithmetic on depth, width and pixels, without a tensor.

A network is a row of layers with weights. Behind each of them is a site where a norm can stand, named as the module
that stands there; a placement picks sites. The border, where a trial is refused, and `networks`, which builds, both
ask here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import ceil

from bnscale.choices import Network, Placement


@dataclass(frozen=True)
class Site:
    """Where a norm can stand."""

    name: str  # module path of the norm
    layer: int  # of the layer before it, 1 for the first; a shortcut counts as the layer that it runs beside
    channels: int
    side: int  # pixels
    branch: bool = False  # within a residual branch
    shortcut: bool = False
    ends_stage: bool = False
    head: bool = False  # behind the last pooling, before the classifier


@dataclass(frozen=True)
class Family:
    """The networks of one kind: which depths there are, and where norms can stand."""

    title: str
    rule: str  # "a CIFAR ResNet has 6n+2 layers"
    legal: Callable[[int], bool]
    sites: Callable[[int, int, int], Iterable[Site]]  # of depth, width and the images' side
    shortcuts: bool  # whether there are convolutions on shortcuts
    widths: tuple[int, ...] = ()  # the only ones there are; empty: any

    def near(self, depth: int) -> list[int]:
        """The nearest legal depths, below and above."""
        below = next((d for d in range(depth - 1, 0, -1) if self.legal(d)), None)
        above = next((d for d in range(depth + 1, depth + 1000) if self.legal(d)), None) if depth > 0 else None
        first = next(d for d in count(1) if self.legal(d))
        return [d for d in (below, above) if d is not None] or [first]


def _resnet(depth: int, width: int, side: int) -> Iterator[Site]:
    """He et al. 2016, section 4.2: three stages of n blocks; 3x3 convolutions of stride 2 round a side up."""
    blocks = (depth - 2) // 6
    channels, layer = 16 * width, 1
    yield Site("norm", layer, channels, side)
    for number in range(3 * blocks):
        stage, place = divmod(number, blocks)
        narrows = stage > 0 and place == 0
        if narrows:
            channels, side = 2 * channels, ceil(side / 2)
        yield Site(f"blocks.{number}.norm1", layer + 1, channels, side, branch=True)
        yield Site(f"blocks.{number}.norm2", layer + 2, channels, side, branch=True, ends_stage=place == blocks - 1)
        if narrows:
            yield Site(f"blocks.{number}.shortcut.norm", layer + 2, channels, side, shortcut=True)
        layer += 2
    yield Site("head_norm", layer, channels, 1, head=True)


VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions before each pooling (open_lth, models/cifar_vgg.py)."""


def _vgg(depth: int, width: int, side: int) -> Iterator[Site]:
    layer, channels = 0, 0
    for stage, convolutions in enumerate(VGG_STAGES[depth]):
        channels = 16 * width * min(2**stage, 8)
        for place in range(convolutions):
            layer += 1
            yield Site(f"layers.{layer}.norm", layer, channels, side, ends_stage=place == convolutions - 1)
        side = max(1, side // 2)
    yield Site("head_norm", layer, channels, 1, head=True)


def _vgg_residual(depth: int, width: int, side: int) -> Iterator[Site]:
    """One convolution, then three stages of blocks of two; the last block of a stage halves the side in its middle."""
    blocks = (depth - 2) // 6
    channels, layer = 16 * width, 1
    yield Site("norm", layer, channels, side)
    for number in range(3 * blocks):
        reduces = number % blocks == blocks - 1
        yield Site(f"blocks.{number}.norm1", layer + 1, channels, side, branch=not reduces)
        if reduces:
            side = max(1, side // 2)
        yield Site(
            f"blocks.{number}.norm2", layer + 2, channels, side, branch=not reduces, ends_stage=reduces
        )  # fmt: skip
        layer += 2
    yield Site("head_norm", layer, channels, 1, head=True)


IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks of each stage (He et al. 2016, table 1; 200: He et al. 2016b). From 50 on they are of three layers."""


def _imagenet_resnet(depth: int, width: int, side: int) -> Iterator[Site]:
    """Names are torchvision's. The stem, the pooling behind it and each stage but the first halve the side."""
    convolutions, growth = (2, 1) if depth < 50 else (3, 4)
    side = ceil(side / 2)
    yield Site("body.bn1", 1, 16 * width, side)
    side, layer, inputs = ceil(side / 2), 1, 16 * width
    for stage, blocks in enumerate(IMAGENET_STAGES[depth]):
        channels = 16 * width * 2**stage
        for place in range(blocks):
            name = f"body.layer{stage + 1}.{place}"
            before, side = side, ceil(side / 2) if stage and not place else side
            # torchvision's bottleneck has its stride at the second convolution.
            for step in range(1, convolutions + 1):
                last = step == convolutions
                at = before if step == 1 and convolutions == 3 else side
                yield Site(
                    f"{name}.bn{step}", layer + step, channels * growth if last else channels, at,
                    branch=True, ends_stage=last and place == blocks - 1,
                )  # fmt: skip
            layer += convolutions
            if inputs != channels * growth or (stage and not place):
                yield Site(f"{name}.downsample.1", layer, channels * growth, side, shortcut=True)
            inputs = channels * growth
    yield Site("head_norm", layer, inputs, 1, head=True)


def _linear(depth: int, width: int, side: int) -> Iterator[Site]:
    """Behind every matrix but the last, which is the output."""
    for layer in range(1, depth):
        yield Site(f"layers.{layer}.norm", layer, width, 1, ends_stage=layer == depth - 1)


FAMILIES = {
    Network.RESNET: Family(
        "CIFAR ResNet", "a CIFAR ResNet has 6n+2 layers",
        lambda depth: depth >= 8 and depth % 6 == 2, _resnet, shortcuts=True,
    ),
    Network.VGG: Family(
        "VGG", "a VGG has 11, 13, 16 or 19 layers", lambda depth: depth in VGG_STAGES, _vgg, shortcuts=False,
    ),
    Network.VGG_RESIDUAL: Family(
        "VGG with residual connections", "a VGG with residual connections has 6n+2 layers",
        lambda depth: depth >= 8 and depth % 6 == 2, _vgg_residual, shortcuts=False,
    ),
    Network.IMAGENET_RESNET: Family(
        "ImageNet ResNet", "an ImageNet ResNet has 18, 34, 50, 101, 152 or 200 layers",
        lambda depth: depth in IMAGENET_STAGES, _imagenet_resnet, shortcuts=True, widths=(4,),
    ),
    Network.LINEAR: Family(
        "deep linear network", "a deep linear network has 1 layer or more",
        lambda depth: depth >= 1, _linear, shortcuts=False,
    ),
}  # fmt: skip


# --- placement --------------------------------------------------------------------------------------


def _every(sites: list[Site]) -> list[Site]:
    return [site for site in sites if not site.head]


def _every_kth(k: int) -> Callable[[list[Site]], list[Site]]:
    return lambda sites: [site for site in _every(sites) if site.layer % k == 0]


def _first(sites: list[Site]) -> list[Site]:
    return sites[:1]


def _last(sites: list[Site]) -> list[Site]:
    """A network without pooling has its last norm behind its last hidden layer."""
    return [site for site in sites if site.head] or sites[-1:]


def _stage_ends(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.ends_stage]


def _branch(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.branch]


def _none(sites: list[Site]) -> list[Site]:
    return []


_PLACEMENTS: dict[Placement, Callable[[list[Site]], list[Site]]] = {
    Placement.EVERY: _every,
    Placement.EVERY_2: _every_kth(2),
    Placement.EVERY_3: _every_kth(3),
    Placement.EVERY_4: _every_kth(4),
    Placement.EVERY_5: _every_kth(5),
    Placement.EVERY_10: _every_kth(10),
    Placement.FIRST: _first,
    Placement.LAST: _last,
    Placement.STAGE_ENDS: _stage_ends,
    Placement.BRANCH: _branch,
    Placement.NONE: _none,
}


def placed(network: Network, depth: int, width: int, side: int, placement: Placement) -> list[Site]:
    """The sites at which a placement puts norms, in the order of the forward pass."""
    return list(_placed(network, depth, width, side, placement))


@lru_cache(maxsize=256)  # a store of a thousand trials has few networks
def _placed(network: Network, depth: int, width: int, side: int, placement: Placement) -> tuple[Site, ...]:
    return tuple(_PLACEMENTS[placement](list(FAMILIES[network].sites(depth, width, side))))
