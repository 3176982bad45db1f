"""Adversarial attacks: images near others that a classifier takes for something else.

A classifier is a function ``images [B, H, W, channels] -> logits [B, C]`` whose row i depends on
image i alone (batch norm in evaluation mode), or a :class:`Randomised` one. Images are floats in
[0, 1], or uint8; radii are in units of [0, 1], such as 8/255. Attacked images are float32 in
[0, 1].

An image whose label is outside [0, C), such as padding, is returned as it is. Every image draws
from a key of its own: with ``indices`` its result does not depend on the batch it comes in. Logits
that are not finite are an error.

An eager call traces and compiles the steps of an attack; a second one with the same shapes and
options runs the same program, with the numbers that ``logits_fn`` closes over as they are then. A
``jax.tree_util.Partial`` that holds its parameters, as ``evaluation.logits_fn_of`` makes, is traced
only once, which takes longer than attacking a few images.
Under ``jax.jit`` an attack is a part of the caller's program, and values are not checked.
"""

from jaxrobust.attacks.boundary import fab
from jaxrobust.attacks.common import Randomised
from jaxrobust.attacks.ensemble import Ensemble, MaskingCheck, auto_attack, masking_checks
from jaxrobust.attacks.gradient import apgd, fgsm, pgd
from jaxrobust.attacks.objectives import dlr_loss, targeted_dlr_loss
from jaxrobust.attacks.square import square_attack

__all__ = ["Ensemble", "MaskingCheck", "Randomised", "apgd", "auto_attack", "dlr_loss", "fab",
           "fgsm", "masking_checks", "pgd", "square_attack", "targeted_dlr_loss"]
