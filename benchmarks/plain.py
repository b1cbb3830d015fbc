"""The loop that bnscale is compared with: what a careful person writes from PyTorch's own tutorials.

Eager, NCHW, float32; a torch DataLoader over PIL images in memory with torchvision's transforms; all BatchNorm
parameters train and everything else is frozen. Nothing of bnscale is imported here.

Legend: N images, C channels, H height, W width.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

IMAGES = 50_000  # in an epoch, as CIFAR-10 has
WARM_UP = 2  # steps before the clock starts: oneDNN's choices, the DataLoader's processes
TRIAL = 6  # steps on which the number of DataLoader processes is chosen


class Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, a 1x1 convolution and BatchNorm on the shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(out_NCHW)) + self.shortcut(x_NCHW))


def resnet(depth: int) -> nn.Module:
    """The CIFAR ResNet of He et al. 2016, section 4.2, of 6n+2 layers and width 16; only BatchNorm trains."""
    blocks: list[nn.Module] = []
    before = 16
    for stage, after in enumerate((16, 32, 64)):
        for place in range((depth - 2) // 6):
            blocks.append(Block(before, after, 2 if stage and not place else 1))
            before = after
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    for module in net.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
    return net


class Images(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: PIL images in memory, transformed one by one. They show noise, which costs the same."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        noise = draw.integers(0, 256, (1000, 32, 32, 3), np.uint8)
        self.images = [Image.fromarray(each) for each in noise]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index % len(self.images)]), index % 10


class Loop:
    """One network in training; `run` goes on from where it stopped. On a GPU batches come by pinned memory."""

    def __init__(self, depth: int, batch: int, workers: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.net = resnet(depth).to(self.device).train()
        trains = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trains, lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.loader = DataLoader(
            Images(), batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        self.batches = self._endless()
        self.run(WARM_UP)

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def run(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of so many updates, data and augmentation included."""
        self._wait()
        start = clock()
        for _ in range(steps):
            images_NCHW, labels_N = (part.to(self.device, non_blocking=True) for part in next(self.batches))
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(images_NCHW), labels_N).backward()
            self.optimizer.step()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        """A GPU runs behind; it is timed when it has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def images_per_second(depth: int, batch: int, steps: int, workers: int, device: str = "cpu") -> float:
    return batch * steps / Loop(depth, batch, workers, device).run(steps)


def best_workers(depth: int, batch: int, most: int) -> int:
    """The number of DataLoader processes, 0 to `most`, with which this loop is fastest here."""
    return best_of(range(most + 1), depth, batch, "cpu")


def best_of(counts: Iterable[int], depth: int, batch: int, device: str) -> int:
    """The same of these numbers, on a device."""
    return max(counts, key=lambda workers: images_per_second(depth, batch, TRIAL, workers, device))
