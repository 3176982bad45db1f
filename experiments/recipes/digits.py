"""Real 8 x 8 digits on a small network: the demonstration, in about two minutes on a CPU.

    python -m experiments reproduce digits

1,437 training images of scikit-learn's digits (237 of them held out for choosing the epoch), 360
test images, a two-layer network, three training seeds. Noise of 0.25 in pixel values: digits bear
far more than photographs. No flips, and crops by one pixel.
"""

from experiments.config import (
    METHOD_LABELS,
    Evaluation,
    OptimizerConfig,
    Recipe,
    RunConfig,
    method_rows,
)

RECIPE = Recipe(
    name="digits",
    title="Digits (8 x 8), a small network",
    rows=method_rows(RunConfig(
        dataset="digits", validation_size=237, model="small_cnn", width=16, num_features=32,
        noise_std=0.25, crop_padding=1, epochs=40, checkpoint_every=4,
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=2.0))),
    labels=METHOD_LABELS,
    evaluation=Evaluation(
        noise_levels=(0, 32, 64, 80, 96), curvature_images=360, tsne_images=360),
    seeds=(0, 1, 2),
)
