"""The scales of a study: the paper's, smaller ones, and the smallest that runs it all."""

import dataclasses

from jaxrobust.app.config import CurvatureConfig, OptimizerConfig, RunConfig
from jaxrobust.app.recipe import Cost, Recipe

SCALES = ("full", "medium", "small", "tiny")


def name_at(study: str, scale: str) -> str:
    """Names a study's recipe at a scale: the study's own name at full scale."""
    return study if scale == "full" else f"{study}_{scale}"


def tiny(recipe: Recipe) -> Recipe:
    """Returns a recipe that runs the same code in seconds; its numbers say nothing.

    A network of two convolutions, 80 training images, one epoch, 60 test images; images of a
    folder at 32 x 40.
    """
    def shrink(config: RunConfig) -> RunConfig:
        return dataclasses.replace(
            config, model="small_cnn", feature_layer="dense", width=4, num_features=8,
            image_size=(32, 40), train_size=80, validation_size=40, batch_size=40, epochs=1,
            checkpoint_every=1, constraint_warmup_epochs=min(0.5, config.constraint_warmup_epochs),
            optimizer=OptimizerConfig(
                learning_rate=0.01, clip_norm=1.0, sam_radius=config.optimizer.sam_radius,
                ema_decay=config.optimizer.ema_decay))

    return dataclasses.replace(
        recipe, name=name_at(recipe.name, "tiny"),
        title=recipe.title.replace(", the paper's settings", "") + ", tiny",
        rows={row: shrink(config) for row, config in recipe.rows.items()},
        evaluation=dataclasses.replace(
            recipe.evaluation, num_draws=2, test_size=60, tsne_images=40,
            perturb=tuple(text.replace("70", "6").replace("(10,6)", "(2,1)")
                          for text in recipe.evaluation.perturb)),
        paper_perturbations={text.replace("70", "6").replace("(10,6)", "(2,1)"): row
                             for text, row in recipe.paper_perturbations.items()},
        curvature=None if recipe.curvature is None else CurvatureConfig(
            num_images=40, num_probes=2, smoothing_draws=3, batch_size=40),
        seeds=(0,), may_diverge=True,
        note="Tiny: it shows that everything runs. Its numbers say nothing.",
        cost=Cost(cpu_hours=0.02, cpu_gigabytes=1.0, gpu_hours=0.02, basis="estimated"))
