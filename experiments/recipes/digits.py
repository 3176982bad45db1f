"""Real 8 x 8 digits on a small network: the demonstration, in some minutes on a CPU.

    python -m experiments reproduce digits

1,200 training images of scikit-learn's digits and 237 held out to choose the epoch, 360 test
images, a network of two convolutions, 60 epochs, three training seeds. Noise of 0.15 in pixel
values: digits bear more than photographs. Crops by one pixel, no flips.

`both` and `stability` run the paper's objectives, `robust` the paper's loss with its weights scaled
down as in `cifar10_small`, which says why; the settings were found on the held-out images.
"""

from experiments.config import (
    SHORT_SCHEDULE_LABELS,
    CurvatureConfig,
    Evaluation,
    OptimizerConfig,
    Recipe,
    RunConfig,
    method_rows,
)
from jaxrobust.losses import RobustLossConfig

RECIPE = Recipe(
    name="digits",
    title="Digits (8 x 8), a small network",
    rows=method_rows(RunConfig(
        dataset="digits", validation_size=237, model="small_cnn", width=16, num_features=32,
        noise_std=0.15, crop_padding=1, epochs=60, checkpoint_every=6, one_pass=True,
        batch_norm_statistics="running",
        robust=RobustLossConfig(alpha=0.01, beta=0.05, lam=0.05),
        optimizer=OptimizerConfig(
            learning_rate=0.01, schedule="cosine", warmup_epochs=2.0, clip_norm=5.0))),
    labels=SHORT_SCHEDULE_LABELS,
    evaluation=Evaluation(noise_levels=(0, 16, 32, 48, 64), tsne_images=360),
    curvature=CurvatureConfig(num_images=360),
    seeds=(0, 1, 2),
    note="In so short a schedule the robust method keeps the paper's loss and distances, with "
         "smaller weights (alpha 0.01, beta 0.05, lambda 0.05), gradients clipped to norm 5, and "
         "one forward pass for both views. Noise of 0.15 (38/255) in training: 48/255 and 64/255 "
         "are beyond it.",
)
