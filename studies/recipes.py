"""The papers' training protocols, each a dict of trial fields with its source.

A study spreads one and adds its axes. Where a field departs from the paper, its comment says so.
"""

from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    DecayOn,
    Network,
    Norm,
    NormInit,
    OutputBias,
    Placement,
    Precision,
    WeightInit,
)

# What all protocols share that say nothing else. Batch normalization after every convolution, as torch and every paper
# here has it; `| {"norm": Norm.GROUP, "groups": 8}` changes it.
BATCH_NORM = {
    "norm": Norm.BATCH,
    "placement": Placement.EVERY,
    "affine": Affine.BOTH,
    "affine_at": Placement.EVERY,
    "norm_init": NormInit.ONES,
    "groups": None,
    "renorm_r": None,
    "renorm_d": None,
    "renorm_start": None,
    "renorm_r_end": None,
    "renorm_d_end": None,
}

# The labels as they were published.
TRUE_LABELS = {"label_noise": 0.0}

# gamma and beta decay as the weights do, and nothing else holds them back.
NO_PENALTIES = {
    "decay_on": DecayOn.ALL,
    "norm_decay": None,
    "gamma_l1": 0.0,
    "gamma_l2": 0.0,
    "beta_l1": 0.0,
    "beta_l2": 0.0,
}

# Frankle, Schwab & Morcos 2021 (arXiv:2003.00152), in the authors' code open_lth (models/cifar_resnet.py,
# foundations/hparams.py, datasets/cifar10.py): SGD with momentum 0.9, batch 128, 160 epochs, rate 0.1 divided by
# 10 at epochs 80 and 120, weight decay 1e-4 on every parameter that trains, gamma and beta too; He normal weights,
# gamma uniform on [0, 1]; flips and 4-pixel shifts.
# Departures: the last, smaller batch of an epoch is dropped (every statistic stands on `norm_batch` images), and
# 5,000 training images are held out to choose the learning rate. The paper trains on all 50,000 at one rate:
# `--set validation=0 --set lr=0.1`.
FRANKLE_CIFAR = (
    BATCH_NORM
    | TRUE_LABELS
    | NO_PENALTIES
    | {
        "data": Data.CIFAR10,
        "validation": 5000,
        "augmentation": Augmentation.FLIP_SHIFT,
        "network": Network.RESNET,
        "width": 1,
        "weight_init": WeightInit.HE_NORMAL,
        "output_bias": OutputBias.RANDOM,
        "norm_init": NormInit.UNIFORM,
        "batch": 128,
        "norm_batch": 128,
        "epochs": 160,
        "steps": None,
        "milestones": (80 / 160, 120 / 160),
        "plateau": None,
        "lr_drop": 0.1,
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "precision": Precision.FP32,
    }
)

# The same paper on ImageNet (open_lth, models/imagenet_resnet.py): batch 1024, rate 0.4, 90 epochs, divided by 10
# at epochs 30, 60 and 80, five epochs of linear warm-up; ResNets of 18 to 200 layers (`depth`). It lacks what this
# project cannot give it yet: the data set. Over how many of a batch's images the authors' GPUs took their statistics
# is not written anywhere: `norm_batch` assumes the whole batch.
FRANKLE_IMAGENET = (
    BATCH_NORM
    | TRUE_LABELS
    | NO_PENALTIES
    | {
        "network": Network.IMAGENET_RESNET,
        "width": 4,
        "weight_init": WeightInit.HE_NORMAL,
        "output_bias": OutputBias.RANDOM,
        "norm_init": NormInit.UNIFORM,
        "batch": 1024,
        "norm_batch": 1024,
        "epochs": 90,
        "steps": None,
        "lr": 0.4,
        "milestones": (30 / 90, 60 / 90, 80 / 90),
        "plateau": None,
        "lr_drop": 0.1,
        "warmup": 5 / 90,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "precision": Precision.FP32,
    }
)

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

# The interim report's VGG-38 with residual connections: 100 epochs on CIFAR-100. The report says no more of it; network
# and width are those of the course it comes from (three stages of six blocks of two convolutions, 32 channels); all
# else is as above.
VGG38_CIFAR100 = FRANKLE_CIFAR | {
    "data": Data.CIFAR100,
    "network": Network.VGG_RESIDUAL,
    "depth": 38,
    "width": 2,
    "epochs": 100,
    "milestones": (),
}

# The same question in minutes on two CPU cores without a network: scikit-learn's digits, as for Frankle et al. above.
# Three poolings leave one of 8x8 pixels. 20 epochs are 500 updates.
VGG38_DIGITS = VGG38_CIFAR100 | {
    "data": Data.DIGITS,
    "validation": 237,
    "augmentation": Augmentation.NONE,
    "batch": 48,
    "norm_batch": 48,
    "epochs": 20,
}

# Bjorck, Gomes, Selman & Weinberger 2018 (arXiv:1806.02375): ResNet-110 on CIFAR-10, batch 128, momentum 0.9, the rate
# divided by 10 at half and three quarters of the training, from a summary and figures of the paper. 165 epochs, weight
# decay 5e-4 and Glorot weights are from memory. The summary says that the rate is cut "when learning plateaus":
# `--set plateau=10 --set milestones=none` does that.
BJORCK_CIFAR = FRANKLE_CIFAR | {
    "depth": 110,
    "weight_init": WeightInit.GLOROT_NORMAL,
    "norm_init": NormInit.ONES,
    "epochs": 165,
    "milestones": (0.5, 0.75),
    "weight_decay": 5e-4,
}

# The same question in minutes on two CPU cores without a network: scikit-learn's digits, as for Frankle et al. above.
# Glorot's weights let the variance of the signal grow by about 1.5 a block without norms, and over the 54 blocks of 110
# layers it explodes; over the 9 of 20 layers it does not, and they train up to 0.1 with batch normalization and
# without. He's weights let it grow by 2 a block, and then 20 layers without norms train at 0.003 and hardly at 0.01.
# Deeper networks would explode more, but have too few of the 150 updates to train at a large rate with norms either
# (56 layers, Glorot: at 0.03 and not at 0.1, with and without).
BJORCK_DIGITS = BJORCK_CIFAR | {
    "depth": 20,
    "weight_init": WeightInit.HE_NORMAL,
    "data": Data.DIGITS,
    "validation": 237,
    "augmentation": Augmentation.NONE,
    "batch": 48,
    "norm_batch": 48,
    "epochs": 6,
}

# Santurkar, Tsipras, Ilyas & Madry 2018 (arXiv:1805.11604v3): a VGG-like network of at least 13 convolutions on
# CIFAR-10 without augmentation, Glorot weights, plain SGD at a fixed rate, batch 128, 15,000 steps. That it is VGG-16
# is our reading of the layers that its figures name. Its losses start higher than a cross-entropy can: some weight
# decay is in them, of unknown size; there is none here.
SANTURKAR_VGG = FRANKLE_CIFAR | {
    "augmentation": Augmentation.NONE,
    "network": Network.VGG,
    "depth": 16,
    "width": 4,
    "weight_init": WeightInit.GLOROT_UNIFORM,
    "norm_init": NormInit.ONES,
    "epochs": None,
    "steps": 15_000,
    "milestones": (),
    "momentum": 0.0,
    "weight_decay": 0.0,
}

# The same question in minutes on two CPU cores without a network: scikit-learn's digits, as for Frankle et al. above.
# On 8x8 pixels the maps of a VGG's last layers have one pixel, where eight of a kernel's nine weights meet padding:
# from Glorot's weights 11, 13 and 16 layers without norms stay at chance for 500 steps, at 0.1 and at 0.5, where with
# batch normalization they are above 90 % within 100 (at 0.5, 16 layers within 300). From He's weights 11 and 13 layers
# without norms come to 89 to 96 % of the test images in 400 steps at 0.1, wander below 60 % at 0.5 and have hardly
# begun at 0.01; 16 layers are at 28 % of a mini-batch after 500 steps at 0.1. Batches of 64 and of 128 train alike, and
# 64 take two thirds of the time.
SANTURKAR_DIGITS = SANTURKAR_VGG | {
    "data": Data.DIGITS,
    "depth": 13,
    "width": 1,
    "weight_init": WeightInit.HE_NORMAL,
    "batch": 64,
    "norm_batch": 64,
    "steps": 400,
}

# The same paper's deep linear network (section 3.1): 25 matrices of 10 by 10, the squared error against a Gaussian
# teacher on 1,000 Gaussian vectors, full-batch gradient descent, 10,000 steps at 1e-6 or 1e-7, Glorot weights. Its
# plots show the error added up over the vectors and halved, as near as their first values tell; so do we.
SANTURKAR_LINEAR = SANTURKAR_VGG | {
    "data": Data.LINEAR_TEACHER,
    "validation": 0,
    "network": Network.LINEAR,
    "depth": 25,
    "width": 10,
    "batch": 1000,
    "norm_batch": 1000,
    "steps": 10_000,
}

# Batch renormalization (Ioffe 2017, arXiv:1702.03275, section 3). There r and d are set free by steps of one ImageNet
# run, 5,000 to 40,000 and 5,000 to 25,000; as shares of any training they are ours.
RENORM = {
    "norm": Norm.RENORM,
    "renorm_r": 3.0,
    "renorm_d": 5.0,
    "renorm_start": 0.05,
    "renorm_r_end": 0.3,
    "renorm_d_end": 0.2,
}
