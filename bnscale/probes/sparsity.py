"""How much of each layer's output is zero (Frankle et al. 2021, section 5)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from bnscale.probes.probe import asks, relus
from bnscale.probes.snapshot import Snapshot
from bnscale.score import EVALUATION_BATCH

IMAGES = 1000  # images of the test part that are looked at; fewer where there are fewer
OFF = 0.99  # a unit that is zero for more than this share of images counts as off


@dataclass(frozen=True)
class Sparsity:
    """One ReLU at one step, in evaluation mode on test images."""

    step: int  # updates taken
    layer: str  # module path, "blocks.143.relu2"; with ":2" for the second use of the same module in one pass
    layer_index: int  # 0 at the stem, growing towards the output
    images: int
    units: int  # channels times pixels
    zero: float  # share of outputs that are exactly 0, over units and images
    off: float  # share of units that are 0 for more than 99 % of the images


@asks(relus, steps=3, rows=lambda trial: trial.layers)
def sparsity(at: Snapshot) -> Iterator[Sparsity]:
    """Frankle et al. 2021, section 5: BN-only training makes activations sparse."""
    layers = [(name, module) for name, module in at.network.named_modules() if isinstance(module, nn.ReLU)]
    zeros: dict[str, Tensor] = {}  # images for which each unit is zero

    uses: Counter[str] = Counter()  # of each module in this pass

    def watch(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            uses[name] += 1
            use = name if uses[name] == 1 else f"{name}:{uses[name]}"
            found = output.clone().eq_(0).sum(0).flatten()  # 1 and 0 in its own type: booleans take five times as long
            zeros[use] = zeros[use] + found if use in zeros else found

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in layers]  # type: ignore[arg-type]
    seen = 0
    try:
        for images_NCHW, _ in at.data.batches("test", EVALUATION_BATCH):
            uses.clear()
            at.logits(images_NCHW[: IMAGES - seen])
            seen += len(images_NCHW[: IMAGES - seen])
            if seen == IMAGES:
                break
    finally:
        for handle in handles:
            handle.remove()
    if not zeros:
        return
    means = torch.stack([z.double().mean() for z in zeros.values()]) / seen
    offs = torch.stack([(z > OFF * seen).double().mean() for z in zeros.values()])
    units = [z.numel() for z in zeros.values()]
    for (name, index), number, zero, off in zip(
        zip(zeros, count(), strict=False), units, means.tolist(), offs.tolist(), strict=True
    ):
        yield Sparsity(at.step, name, index, seen, number, zero, off)
