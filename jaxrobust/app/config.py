"""The configurations of runs, measurements and tests, as frozen dataclasses and as JSON."""

import dataclasses
import json
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import tyro

from jaxrobust import InputError, _validate
from jaxrobust._hyperparameters import hyperparameters
from jaxrobust.data import DATASETS, FOLDER_PREFIX
from jaxrobust.losses import RobustLossConfig
from jaxrobust.methods import METHODS, MethodOptions
from jaxrobust.models import MODELS
from jaxrobust.models.resnet import FEATURE_LAYERS
from jaxrobust.perturbations import Perturbation, gaussian, parse_perturbation
from jaxrobust.training import WHEN_NOT_FINITE

FOLDER_OPTIONS = ("skip_bad", "join_near_copies", "outside_links")
"""The settings of a run that are switched on for folders of images."""

SEEDS = 2**32
"""Seeds are below this limit: JAX uses only their last 32 bits."""

MOST_CHANNELS, MOST_EPOCHS, MOST_PIXELS = 2**16, 2**20, 2**14
"""Upper limits, far beyond any use, for the width of a layer, the number of epochs and the height
or width of an image."""

MAX_NOISE_LEVEL = 255
MIN_NOISE_LEVEL = 0.25
"""Limits of noise levels other than 0, in units of 1/255: the whole range of pixel values, and less
than the rounding error of 8 bits (0.29)."""


def distinct(name: str, values: Sequence) -> None:
    """Raises InputError for a duplicate."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InputError(f"Expected each {name} once, got {value} twice.")


def check_seeds(seeds: Sequence[int] | None) -> None:
    """Raises InputError unless ``seeds``, if given, are one or more different seeds."""
    if seeds is None:
        return
    if not seeds:
        raise InputError("Expected at least one seed in seeds, got none.")
    for seed in seeds:
        _validate.in_range("seed", seed, 0, SEEDS)
    distinct("seed", seeds)


def check_length(name: str, value: float, inputs: str = "pixels") -> None:
    """Raises InputError unless a step or a standard deviation fits the range of the inputs, which
    is known only for pixels."""
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
    """SGD with Nesterov momentum as in Appendix H.1 of the paper (the defaults), or Adam as in
    Appendix H.2."""

    name: str = "sgd"
    """"sgd" or "adam", both as PyTorch defines them."""
    learning_rate: float = 1e-3
    """Initial learning rate, reached after warm-up."""
    schedule: str = "piecewise"
    """"piecewise": multiply by decay_factor after each of decay_epochs; "cosine": decay to 0."""
    decay_epochs: tuple[int, ...] = (60, 120, 160)
    """Epochs after which the piecewise schedule lowers the rate."""
    decay_factor: float = 0.2
    """Factor by which the piecewise schedule multiplies the rate each time."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate grows linearly from 0, before a cosine schedule."""
    momentum: float = 0.9
    """Nesterov momentum of "sgd", in [0, 1); "adam" uses its standard 0.9 and 0.999."""
    weight_decay: float = 5e-4
    """Weight of the L2 penalty, added to the gradient of every parameter."""
    clip_norm: float | None = None
    """Clip gradients to this global norm; the paper does not clip."""
    sam_radius: float = 0.0
    """Radius rho of sharpness-aware minimisation, such as 0.05, which doubles the work of an
    update; 0 for none."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the parameters that is validated and kept, such as
    0.999; 0 for the parameters themselves."""

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
        _validate.in_range("sam_radius", self.sam_radius, 0)
        _validate.in_range("ema_decay", self.ema_decay, 0, 1)
        if self.schedule == "piecewise" and self.warmup_epochs:
            raise InputError(
                f"Expected warmup_epochs=0 with schedule='piecewise', got {self.warmup_epochs}.")


@hyperparameters("noise_std", "stability_weight", "robust", "options")
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: data set, model, method and seed. Determines the result to the bit.

    As a pytree, its leaves are the settings in which runs of one compiled program may differ; see
    :data:`SWEPT`.
    """

    dataset: Annotated[str, tyro.conf.arg(name="data")] = "digits"
    """"digits", "cifar10", "svhn_cropped", or "folder:PATH": a folder with a sub-folder of images
    for each class, or a CSV file with the columns path and label. Four fifths of each class are
    for training and the rest for the test, unless folders "train", "test" and "val" with the
    classes in each, or a column split, say otherwise."""
    image_size: tuple[int, int] = (400, 500)
    """Height and width to which the images of a folder are resized, in pixels."""
    split_seed: int = 0
    """Seed that divides a folder's images into training and test images."""
    skip_bad: bool = False
    """Skip images of a folder that cannot be used, instead of stopping."""
    join_near_copies: bool = False
    """Keep images of a folder that are nearly the same on one side of a drawn split."""
    outside_links: bool = False
    """Follow links, and paths in a CSV file, that lead out of the folder of images."""
    train_size: int | None = None
    """Number of training images, drawn at random by class with seed 0; none to use all that are not
    held out."""
    validation_size: int | float = 0
    """Number of training images to hold out for validation, at random by class with seed 0, or
    their share if below 1. Ignored if the data set has its own validation images."""
    select: str = "validation"
    """Epoch to keep: the best on the "validation" images, the "last", or the best on the "test"
    images, which is the paper's protocol and leaks the test set."""
    model: str = "resnet18"
    """"resnet18" (for small images), "resnet18_imagenet", "mobilenet_v3_small",
    "mobilenet_v3_large" or "small_cnn"."""
    init_from: str | None = None
    """File of PyTorch weights, .safetensors or .pth, to start from. No layer is frozen."""
    width: int = 64
    """Channels of the model's first stage; the standard MobileNetV3 has 16."""
    num_features: int = 128
    """Dimension of the features, the output of the penultimate layer."""
    feature_layer: str = "dense"
    """Penultimate layer of a ResNet18: "dense", fully connected as in the paper; "dense_relu", the
    same with a ReLU; "pooled", the pooled output of the last stage, of dimension 8 x width."""
    dtype: str = "float32"
    """Precision of the network's layers: "float32" or "bfloat16". Parameters, batch statistics,
    features, centroids and losses are always float32."""
    batch_norm: str = "synchronised"
    """Batch statistics on several devices: of the whole batch, "synchronised", or of each device's
    share, "per_device", which makes the result depend on the number of devices."""
    batch_norm_statistics: str = "recomputed"
    """Batch-norm statistics for evaluation: "recomputed" from training images with the parameters
    of that epoch, or the "running" averages of training, as in the paper, which lag behind in a
    short training."""
    method: str = "robust"
    """Training method: "normal", "noisy", "both", "stability", "robust", "robust_both", which adds
    the paper's loss to the softmax losses of "both", or "robust_clean", which constrains clean
    images alone, as in the paper's ablation; or one of the field's: "center", "consistency",
    "noisy_consistency", "gradient_penalty", "jacobian_penalty", "cure", "large_margin",
    "pgd", "trades" or "augmix"."""
    robust: RobustLossConfig = RobustLossConfig()
    """Settings of the loss of "robust", "robust_both" and "robust_clean"."""
    stability_weight: float = 1.0
    """Weight of the stability term in the method "stability"."""
    options: MethodOptions = MethodOptions()
    """Settings of the methods beyond the paper."""
    label_smoothing: float = 0.0
    """Share of each label that every softmax loss gives to all classes alike, in [0, 1)."""
    class_weights: str = "none"
    """Weights of the classes in every softmax loss: "none" for equal weights, or "balanced" for
    N / (C n_c), where class c has n_c of the N training images in C classes. The loss of a batch is
    the weighted mean over its images."""
    one_pass: bool = False
    """Send clean and noisy images through one forward pass in "stability", "robust" and
    "consistency", so that they share batch statistics, as "both" always does."""
    constraint_warmup_epochs: float = 0.0
    """Epochs over which the weights of the terms beside the softmax loss grow linearly from 0."""
    noise_std: float = 0.06
    """Standard deviation of the training noise, in pixel values of [0, 1]: 40/255 is 0.157. It is
    also the scale at which curvature and theory examine the loss."""
    perturb: str | None = None
    """Perturbation that makes the noisy view, such as "laplace(0.06)" or
    "gaussian(40/255)+occlusion(20,70)"; none for Gaussian noise of noise_std."""
    augmentation: str = "crop"
    """"crop": random crop and flip, as in Appendix H.1; "photo": colour jitter, rotation,
    perspective and flip, as in Appendix H.2."""
    crop_padding: int = 4
    """Padding of the random crop, in pixels."""
    independent_views: bool = False
    """Give the noisy view its own crop and flip, as in the authors' release."""
    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 64
    """Images in each update, on all devices together."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 1
    """Epochs between checkpoints; the run is validated at each checkpoint."""
    when_not_finite: str = "stop"
    """What training does with an update whose loss, gradient, features or logits are NaN or
    infinite: "stop", and keep it for the command replay; or "skip" it and count it in the log."""
    seed: int = 0
    """Seed of the initial parameters, the order of the images, the augmentation and the noise."""

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
        _validate.one_of("when_not_finite", self.when_not_finite, WHEN_NOT_FINITE)
        try:
            _validate.in_range("noise_std", self.noise_std, 0, 1, open_high=False)
        except InputError as error:
            hint = (f" Did you mean {self.noise_std:g}/255, which is {self.noise_std / 255:.3g}?"
                    if 1 < self.noise_std <= 255 else "")
            raise InputError(f"{str(error)[:-1]}, in pixel values of [0, 1].{hint}") from error
        training_perturbation(self)  # Raises for an invalid one.
        for name, most in (("width", MOST_CHANNELS), ("num_features", MOST_CHANNELS),
                           ("epochs", MOST_EPOCHS), ("checkpoint_every", MOST_EPOCHS)):
            _validate.in_range(name, getattr(self, name), 1, most)
        # One image has no variance for batch norm.
        _validate.in_range("batch_size", self.batch_size, 2)
        _validate.in_range("crop_padding", self.crop_padding, 0, MOST_PIXELS)
        if self.train_size is not None:
            _validate.in_range("train_size", self.train_size, 1)
        for name in ("validation_size", "stability_weight", "constraint_warmup_epochs"):
            _validate.in_range(name, getattr(self, name), 0)
        _validate.in_range("label_smoothing", self.label_smoothing, 0, 1)
        for name in ("seed", "split_seed"):
            _validate.in_range(name, getattr(self, name), 0, SEEDS)
        if self.validation_size >= 1 and self.validation_size != int(self.validation_size):
            raise InputError(f"Expected validation_size={self.validation_size} to be a number of "
                             "images, or a share below 1.")
        if self.optimizer.ema_decay and self.batch_norm_statistics == "running":
            raise InputError("Expected batch_norm_statistics='recomputed' with optimizer.ema_decay="
                             f"{self.optimizer.ema_decay:g}: running statistics belong to other "
                             "parameters.")
        if self.optimizer.warmup_epochs >= self.epochs:
            raise InputError(
                f"Expected optimizer.warmup_epochs={self.optimizer.warmup_epochs:g} below "
                f"epochs={self.epochs}: the warm-up must end within the training. Set both.")
        if self.select == "validation" and self.validation_size == 0:
            raise InputError("Expected validation_size=0 to be > 0 with select='validation'.")


def training_perturbation(config: RunConfig) -> Perturbation:
    """Makes the perturbation for the noisy view of a run's training images."""
    return gaussian(config.noise_std) if config.perturb is None else parse_perturbation(
        config.perturb)


@dataclasses.dataclass(frozen=True)
class CurvatureConfig:
    """How the curvature of a run's loss is measured."""

    num_images: int = 256
    """Number of test images, taken from the first on."""
    num_probes: int = 20
    """Random directions for each image: K in Eq. 21, and the number of exact Hessian-vector
    products if the network is not piecewise linear."""
    step: float = 1e-2
    """Step t of Eq. 21, in units of the inputs: pixel values of [0, 1], unlike noise levels."""
    smoothing: float | None = None
    """Standard deviation of the noise that the smoothed curvature averages over, in units of the
    inputs; none for that of the training noise (divided by the largest of the channels' standard
    deviations if inputs are normalised)."""
    smoothing_draws: int = 32
    """Pairs of noisy images drawn for each image."""
    inputs: str = "pixels"
    """Inputs of the derivatives: "pixels" in [0, 1], or "normalised" images, as in the paper."""
    batch_size: int = 32
    """Images processed at once. Changes the memory and the time, not the values."""
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
    """How runs are tested."""

    noise_levels: tuple[float, ...]
    """Standard deviations of the Gaussian noise, in units of 1/255: 15.3 here is 0.06 in noise_std.
    0 is the clean image."""
    num_draws: int = 10
    """Independent draws of the noise at each level."""
    perturb: tuple[str, ...] = ()
    """Other perturbations, such as "occlusion(20,70)" or "gaussian(40/255)+occlusion(20,70)".
    Deterministic ones are applied once."""
    test_size: int | None = None
    """Number of test images, drawn at random by class with seed 0; none for all."""
    tsne_images: int = 1000
    """Number of test images shown in the t-SNE figure, taken from the first on."""

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
"""The settings, besides the seed, in which runs that are trained together may differ."""


if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = typing.TypeVar("Config", bound="DataclassInstance")


def get_setting(config, name: str):
    """The value of a setting with a dotted name, such as ``"robust.lam"``."""
    return operator.attrgetter(name)(config)


def with_settings(config: Config, values: Mapping[str, typing.Any]) -> Config:
    """Replaces the values of settings with dotted names in a dataclass instance."""
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        if inner:
            value = with_settings(getattr(config, outer), {inner: value})
        config = dataclasses.replace(config, **{outer: value})
    return config


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """Changes the number of epochs, with the whole schedule: drops of the rate, warm-ups and
    validations keep their places in it, the numbers of epochs that are integers rounded, to at
    least 1."""
    ratio, optimizer = epochs / config.epochs, config.optimizer

    def whole(number: int) -> int:
        return max(1, round(ratio * number))

    return dataclasses.replace(
        config, epochs=epochs, checkpoint_every=whole(config.checkpoint_every),
        constraint_warmup_epochs=ratio * config.constraint_warmup_epochs,
        optimizer=dataclasses.replace(
            optimizer, warmup_epochs=ratio * optimizer.warmup_epochs,
            decay_epochs=tuple(map(whole, optimizer.decay_epochs))
            if optimizer.schedule == "piecewise" else optimizer.decay_epochs))


def to_json(config) -> str:
    """Writes a configuration, with all its fields, as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls, values: dict):
    """Makes an instance of the dataclass ``cls`` from the content that :func:`to_json` wrote.

    Raises:
      InputError: (a ValueError) for an unknown field, or a value of another type than the field's.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise InputError(f"Expected the fields of {cls.__name__}, got {values!r}.")
    for name in values:
        _validate.one_of(f"field of {cls.__name__}", name, hints)

    def convert(name, value):
        if dataclasses.is_dataclass(hints[name]):
            return from_dict(hints[name], value)
        value = tuple(value) if isinstance(value, list) else value
        if not _is_of(value, hints[name]):
            kind = str(hints[name]) if typing.get_args(hints[name]) else hints[name].__name__
            raise InputError(f"Expected {name}={value!r} of {cls.__name__} to be of type {kind}.")
        return value

    return cls(**{name: convert(name, value) for name, value in values.items()})


def _is_of(value, hint) -> bool:
    """Whether a value from a JSON file, with tuples for lists, is of the type of a field."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple) or (
                kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            return False
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        return all(map(_is_of, value, kinds))
    if hint is float:
        hint = int | float  # A whole number has no point in all files.
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


BEFORE_CHOICES = {"batch_norm_statistics": "running", "class_weights": "none"}
"""Values of settings that are missing from files written before these settings existed."""
