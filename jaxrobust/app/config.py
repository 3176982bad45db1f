"""What a run is: its configuration as a frozen dataclass, and as JSON."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import tyro

from jaxrobust import InputError, _validate
from jaxrobust._hyperparameters import hyperparameters
from jaxrobust.data import DATASETS, FOLDER_PREFIX
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import METHODS
from jaxrobust.models import MODELS
from jaxrobust.models.resnet import FEATURE_LAYERS
from jaxrobust.perturbations import Perturbation, gaussian, parse_perturbation

SEEDS = 2**32
"""Seeds are below: JAX takes the last 32 bits of them, so that this one would be 0 again."""

MOST_CHANNELS, MOST_EPOCHS, MOST_PIXELS = 2**16, 2**20, 2**14
"""Bounds of what no machine holds or ends, far beyond any use: of the widths of layers, of epochs,
of the sides of an image."""

MAX_NOISE_LEVEL = 255
MIN_NOISE_LEVEL = 0.25
"""Bounds of noise levels other than 0, in units of 1/255: the whole range of the pixels, and less
than what rounding to 8 bits adds (0.29)."""


def distinct(name: str, values: Sequence) -> None:
    """Raises InputError for a value that is given twice."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InputError(f"Expected each {name} once, got {value} twice.")


def check_seeds(seeds: Sequence[int] | None) -> None:
    """Raises InputError unless ``seeds``, if given, are at least one, all different and in range.
    """
    if seeds is None:
        return
    if not seeds:
        raise InputError("Expected at least one seed, got none.")
    for seed in seeds:
        _validate.in_range("seed", seed, 0, SEEDS)
    distinct("seed", seeds)


def check_length(name: str, value: float, inputs: str = "pixels") -> None:
    """Raises InputError unless a step or a standard deviation is within the range of the inputs,
    which for normalised ones is not known."""
    _validate.in_range(name, value, 0, open_low=True)
    if inputs == "pixels" and value > 1:
        raise InputError(f"Expected {name}={value:g} in (0, 1], in pixel values of [0, 1].")


def check_image_size(size: Sequence[int]) -> None:
    """Raises InputError unless ``size`` is a height and a width."""
    if len(size) != 2 or min(size) < 1 or max(size) > MOST_PIXELS:
        raise InputError(f"Expected image_size={size} as a height and a width in "
                         f"[1, {MOST_PIXELS}].")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD with Nesterov momentum as in Appendix H.1 of the paper, whose values are the defaults, or
    Adam as in Appendix H.2."""

    name: str = "sgd"
    """"sgd" or "adam", both as PyTorch defines them."""
    learning_rate: float = 1e-3
    """Initial (after warm-up) learning rate."""
    schedule: str = "piecewise"
    """"piecewise": multiplied by decay_factor after each of decay_epochs; "cosine": to 0."""
    decay_epochs: tuple[int, ...] = (60, 120, 160)
    """Of the piecewise schedule."""
    decay_factor: float = 0.2
    """Of the piecewise schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear growth from 0, before a cosine schedule."""
    momentum: float = 0.9
    """Nesterov momentum of "sgd", in [0, 1); "adam" has its usual 0.9 and 0.999."""
    weight_decay: float = 5e-4
    """L2 penalty in the gradient of every parameter."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; none in the paper."""

    def __post_init__(self):
        _validate.one_of("optimizer", self.name, ("sgd", "adam"))
        _validate.in_range("learning_rate", self.learning_rate, 0, open_low=True)
        _validate.one_of("schedule", self.schedule, ("piecewise", "cosine"))
        _validate.in_range("warmup_epochs", self.warmup_epochs, 0)
        for epoch in self.decay_epochs:
            _validate.in_range("decay_epochs", epoch, 1, MOST_EPOCHS)
        distinct("decay epoch", self.decay_epochs)
        _validate.in_range("decay_factor", self.decay_factor, 0, open_low=True)
        _validate.in_range("momentum", self.momentum, 0, 1)
        _validate.in_range("weight_decay", self.weight_decay, 0)
        if self.clip_norm is not None:
            _validate.in_range("clip_norm", self.clip_norm, 0, open_low=True)
        if self.schedule == "piecewise" and self.warmup_epochs:
            raise InputError(
                f"Expected warmup_epochs=0 with schedule='piecewise', got {self.warmup_epochs}.")


@hyperparameters("noise_std", "stability_weight", "robust")
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training: a data set, a model, a method, a seed. Decides the result to the bit.

    A pytree of the numbers in which runs of one compiled program may differ, see :data:`SWEPT`.
    """

    dataset: Annotated[str, tyro.conf.arg(name="data")] = "digits"
    """"digits", "cifar10", "svhn_cropped", or "folder:PATH": a folder with a sub-folder of images
    for each class, or a CSV file with the columns path and label. Four fifths of these, by class,
    are for training, the rest is the test set, unless the split is given: by folders "train",
    "test" and "val" with the classes in each, or by the column split."""
    image_size: tuple[int, int] = (400, 500)
    """Height and width to which the images of a folder are resized."""
    split_seed: int = 0
    """Of the division of a folder's images into training and test images."""
    skip_bad: bool = False
    """Whether to go on without those images of a folder that cannot be used."""
    train_size: int | None = None
    """Training images, drawn by class at random with seed 0; none for all that are left."""
    validation_size: int | float = 0
    """Images held out of the training split, by class at random with seed 0: their number or, if
    it is below 1, their share. None are where the data set has validation images of its own."""
    select: str = "validation"
    """Which epoch is kept: the best on the "validation" images, the "last", or the best on the
    "test" images. The last of these is the paper's protocol; it leaks the test set."""
    model: str = "resnet18"
    """"resnet18" (for small images), "resnet18_imagenet", "mobilenet_v3_small",
    "mobilenet_v3_large" or "small_cnn"."""
    init_from: str | None = None
    """File of PyTorch weights, .safetensors or .pth, to start from; nothing is frozen."""
    width: int = 64
    """Channels of the model's first stage; 16 for the usual MobileNetV3."""
    num_features: int = 128
    """Dimension of the penultimate layer."""
    feature_layer: str = "dense"
    """What the penultimate layer of a ResNet18 is: "dense", a fully connected one, as in the paper;
    "dense_relu", followed by ReLU; "pooled", the pooled output of the last stage, of dimension 8
    times the width."""
    dtype: str = "float32"
    """Of the network's computation: "float32" or "bfloat16". Parameters, batch statistics,
    features, centroids and losses are float32 in both."""
    batch_norm: str = "synchronised"
    """Over several devices, batch statistics of the whole batch, "synchronised", or of each
    device's share, "per_device"; the result then depends on how many there are."""
    batch_norm_statistics: str = "recomputed"
    """What batch norm evaluates with: statistics "recomputed" from training images with the
    parameters of that epoch, or the "running" averages of training, as in the paper, which in a
    short training lag behind."""
    method: str = "robust"
    """"normal", "noisy", "both", "stability", "robust", or "robust_clean": the constraints on clean
    images alone, as in the paper's ablation."""
    robust: RobustLossConfig = RobustLossConfig()
    """Of the method "robust"."""
    stability_weight: float = 1.0
    """Of the method "stability"."""
    class_weights: str = "none"
    """Of the softmax losses of every method: "none", all images alike, or "balanced", an image of
    class c with the weight N / (C n_c), n_c being its training images of N in C classes; a batch's
    loss is the weighted mean over its images."""
    one_pass: bool = False
    """Of "stability" and "robust": whether clean and noisy images share a forward pass, and with
    it batch norm's statistics, as they always do in "both"."""
    constraint_warmup_epochs: float = 0.0
    """Epochs over which the terms beside the softmax loss grow linearly to their weight."""
    noise_std: float = 0.06
    """Standard deviation of the training noise, in pixel values of [0, 1], so that 40/255 is 0.157;
    also the scale at which curvature and theory look at the loss."""
    perturb: str | None = None
    """What makes the noisy view, such as "laplace(0.06)" or "gaussian(40/255)+occlusion(20,70)";
    none for Gaussian noise of noise_std."""
    augmentation: str = "crop"
    """"crop": random crop and flip, as in Appendix H.1; "photo": colour jitter, rotation,
    perspective and flip, as in Appendix H.2."""
    crop_padding: int = 4
    """Padding of the random crop, in pixels."""
    independent_views: bool = False
    """Whether the noisy view has a crop and flip of its own, as in the authors' release."""
    epochs: int = 200
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 1
    """Epochs between checkpoints; at each the run is validated."""
    seed: int = 0
    """Of the initial parameters, the order, the augmentation and the noise."""

    def __post_init__(self):
        if not self.dataset.startswith(FOLDER_PREFIX):
            _validate.one_of("dataset", self.dataset, (*DATASETS, f"{FOLDER_PREFIX}PATH"))
        check_image_size(self.image_size)
        _validate.one_of("model", self.model, MODELS)
        _validate.one_of("method", self.method, METHODS)
        _validate.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _validate.one_of("feature_layer", self.feature_layer, FEATURE_LAYERS)
        _validate.one_of("class_weights", self.class_weights, ("none", "balanced"))
        _validate.one_of("batch_norm", self.batch_norm, ("synchronised", "per_device"))
        _validate.one_of(
            "batch_norm_statistics", self.batch_norm_statistics, ("recomputed", "running"))
        _validate.one_of("select", self.select, ("validation", "test", "last"))
        _validate.one_of("augmentation", self.augmentation, ("crop", "photo"))
        try:
            _validate.in_range("noise_std", self.noise_std, 0, 1, open_high=False)
        except InputError as error:
            hint = (f" Did you mean {self.noise_std:g}/255, which is {self.noise_std / 255:.3g}?"
                    if 1 < self.noise_std <= 255 else "")
            raise InputError(f"{str(error)[:-1]}, in pixel values of [0, 1].{hint}") from error
        training_perturbation(self)  # Says what is wrong with it.
        for name, most in (("width", MOST_CHANNELS), ("num_features", MOST_CHANNELS),
                           ("epochs", MOST_EPOCHS),
                           ("checkpoint_every", MOST_EPOCHS)):
            _validate.in_range(name, getattr(self, name), 1, most)
        # One image has no variance for batch norm.
        _validate.in_range("batch_size", self.batch_size, 2)
        _validate.in_range("crop_padding", self.crop_padding, 0, MOST_PIXELS)
        if self.train_size is not None:
            _validate.in_range("train_size", self.train_size, 1)
        for name in ("validation_size", "stability_weight", "constraint_warmup_epochs"):
            _validate.in_range(name, getattr(self, name), 0)
        for name in ("seed", "split_seed"):
            _validate.in_range(name, getattr(self, name), 0, SEEDS)
        if self.validation_size >= 1 and self.validation_size != int(self.validation_size):
            raise InputError(f"Expected validation_size={self.validation_size} to be a number of "
                             "images, or a share below 1.")
        if self.optimizer.warmup_epochs >= self.epochs:
            raise InputError(
                f"Expected optimizer.warmup_epochs={self.optimizer.warmup_epochs:g} below "
                f"epochs={self.epochs}: the warm-up must end within the training. Set both.")
        if self.select == "validation" and self.validation_size == 0:
            raise InputError("Expected validation_size=0 to be > 0 with select='validation'.")


def training_perturbation(config: RunConfig) -> Perturbation:
    """What makes the noisy view of a run's training images.

    Raises:
      InputError: (a ValueError) if it is not what :func:`parse_perturbation` reads.
    """
    return gaussian(config.noise_std) if config.perturb is None else parse_perturbation(
        config.perturb)


@dataclasses.dataclass(frozen=True)
class CurvatureConfig:
    """What of the curvature of a run's loss is measured, and how."""

    num_images: int = 256
    """Test images: the first so many."""
    num_probes: int = 20
    """Random directions for each image: K of Eq. 21, and of the exact products where the network
    is not piecewise linear."""
    step: float = 1e-2
    """t of Eq. 21, in units of the inputs: pixel values of [0, 1], unlike noise levels."""
    smoothing: float | None = None
    """Standard deviation of the noise that the smoothed curvature averages over, in units of the
    inputs; none for that of the training noise (with normalised inputs, over the largest of the
    channels' std)."""
    smoothing_draws: int = 32
    """Pairs of noisy images, for each image."""
    inputs: str = "pixels"
    """What the derivatives are with respect to: "pixels" in [0, 1], or "normalised" images, as
    in the paper."""
    batch_size: int = 32
    """Images at once. It changes the memory and the time, not the values."""
    test_size: int | None = None
    """Test images, drawn by class at random with seed 0, of which the first are taken; none for
    all, in their order."""

    def __post_init__(self):
        _validate.one_of("inputs", self.inputs, ("pixels", "normalised"))
        for name, least in (("num_images", 1), ("num_probes", 2), ("smoothing_draws", 3),
                            ("batch_size", 1)):
            _validate.in_range(name, getattr(self, name), least)
        if self.test_size is not None:
            _validate.in_range("test_size", self.test_size, 1)
        for name in ("step", "smoothing"):
            if getattr(self, name) is not None:
                check_length(name, getattr(self, name), self.inputs)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the runs of a recipe are tested."""

    noise_levels: tuple[float, ...]
    """Standard deviations of the Gaussian noise, in units of 1/255, unlike noise_std: 15.3 here is
    0.06 there. 0 is the clean image."""
    num_draws: int = 10
    """Independent draws of the noise at each level."""
    perturb: tuple[str, ...] = ()
    """Other perturbations, such as "occlusion(20,70)" or "gaussian(40/255)+occlusion(20,70)"; those
    without randomness are drawn once."""
    test_size: int | None = None
    """Test images, drawn by class at random with seed 0; none for all."""
    tsne_images: int = 1000
    """Of these, the first so many are shown in the t-SNE figure."""

    def __post_init__(self):
        _validate.in_range("number of noise levels", len(self.noise_levels), 1)
        for level in self.noise_levels:
            _validate.in_range("noise level", level, 0)
            if level > MAX_NOISE_LEVEL:
                raise InputError(f"Expected noise level={level:g} in [0, {MAX_NOISE_LEVEL}], in "
                                 "units of 1/255 of the pixel range.")
            if 0 < level < MIN_NOISE_LEVEL:
                raise InputError(
                    f"Expected noise level={level:g} as 0 or in [{MIN_NOISE_LEVEL}, "
                    f"{MAX_NOISE_LEVEL}], in units of 1/255 of the pixel range. Did you mean "
                    f"{255 * level:g}, which is {level:g} in pixel values of [0, 1]?")
        distinct("noise level", self.noise_levels)
        for text in self.perturb:
            parse_perturbation(text)
        distinct("perturbation", self.perturb)
        _validate.in_range("num_draws", self.num_draws, 1)
        if self.test_size is not None:
            _validate.in_range("test_size", self.test_size, 1)
        _validate.in_range("tsne_images", self.tsne_images, 1)


SWEPT = tuple(jax.tree_util.keystr(path, simple=True, separator=".")
              for path, _ in jax.tree_util.tree_leaves_with_path(RunConfig(select="last")))
"""Settings, beside the seed, in which runs that are trained together may differ."""


def get_setting(config, name: str):
    """The value of a setting with a dotted name, such as ``"robust.lam"``."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_settings(config: RunConfig, values: Mapping[str, typing.Any]) -> RunConfig:
    """The configuration with other values for settings with dotted names."""
    for name, value in values.items():
        outer, _, inner = name.rpartition(".")
        if outer:
            value = dataclasses.replace(get_setting(config, outer), **{inner: value})
        config = dataclasses.replace(config, **{outer or inner: value})
    return config


def to_json(config) -> str:
    """A configuration as JSON text, every field written out."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls, values: dict):
    """The dataclass ``cls`` from what :func:`to_json` wrote.

    Raises:
      InputError: (a ValueError) for a field that ``cls`` does not have.
    """
    types = typing.get_type_hints(cls)
    for name in values:
        _validate.one_of(f"field of {cls.__name__}", name, types)

    def convert(name, value):
        if dataclasses.is_dataclass(types[name]):
            return from_dict(types[name], value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: convert(name, value) for name, value in values.items()})


BEFORE_CHOICES = {"batch_norm_statistics": "running", "class_weights": "none"}
"""What runs had of settings that their files do not name, since they were no choice then."""
