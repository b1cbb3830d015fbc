"""The papers' training protocols, each a dict of trial fields with its source.

A study spreads one and adds its axes. Where a field departs from the paper, its comment says so.
"""

from bnscale.trial import Augmentation, Data, Network, NormInit, Precision

# Frankle, Schwab & Morcos 2021 (arXiv:2003.00152), in the authors' code open_lth (models/cifar_resnet.py,
# foundations/hparams.py, datasets/cifar10.py): SGD with momentum 0.9, batch 128, 160 epochs, rate 0.1 divided by
# 10 at epochs 80 and 120, weight decay 1e-4 on every parameter that trains, gamma and beta too; He normal weights,
# gamma uniform on [0, 1]; flips and 4-pixel shifts.
# Departures: the last, smaller batch of an epoch is dropped (every statistic stands on `norm_batch` images), and
# 5,000 training images are held out to choose the learning rate. The paper trains on all 50,000 at one rate:
# `--set validation=0 --set lr=0.1`.
FRANKLE_CIFAR = {
    "data": Data.CIFAR10,
    "validation": 5000,
    "augmentation": Augmentation.FLIP_SHIFT,
    "network": Network.RESNET,
    "width": 1,
    "norm_init": NormInit.UNIFORM,
    "batch": 128,
    "norm_batch": 128,
    "epochs": 160,
    "steps": None,
    "milestones": (80 / 160, 120 / 160),
    "lr_drop": 0.1,
    "warmup": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "precision": Precision.FP32,
}

# The same paper on ImageNet (open_lth, models/imagenet_resnet.py): batch 1024, rate 0.4, 90 epochs, divided by 10
# at epochs 30, 60 and 80, five epochs of linear warm-up. It lacks what this project cannot give it yet: the data
# set, and ResNets 18 to 200 for images of 224 pixels. Over how many of a batch's images the authors' GPUs took their
# statistics is not written anywhere: `norm_batch` assumes the whole batch.
FRANKLE_IMAGENET = {
    "norm_init": NormInit.UNIFORM,
    "batch": 1024,
    "norm_batch": 1024,
    "epochs": 90,
    "steps": None,
    "lr": 0.4,
    "milestones": (30 / 90, 60 / 90, 80 / 90),
    "lr_drop": 0.1,
    "warmup": 5 / 90,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "precision": Precision.FP32,
}

# The same question in minutes on two CPU cores without a network: scikit-learn's digits, 8x8 pixels. Small batches,
# because BN-only training needs many updates, and no augmentation, because a shifted 8x8 digit loses strokes.
FRANKLE_DIGITS = FRANKLE_CIFAR | {
    "data": Data.DIGITS,
    "validation": 237,
    "augmentation": Augmentation.NONE,
    "batch": 48,
    "norm_batch": 48,
    "epochs": 6,
}
