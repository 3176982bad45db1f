"""The accuracies that the paper reports, in per cent: mean and spread over 10 draws of noise."""

from jaxrobust.app import published
from jaxrobust.app.published import AccuracyTable, PerturbationTable

TABLES = {
    "table1": AccuracyTable(
        "Table 1, CIFAR-10 (training noise 0.06)",
        (0, 2, 4, 8, 16, 20),
        {
            "normal": ((92.73, None), (92.63, 0.09), (91.95, 0.09), (87.73, 0.19),
                       (64.93, 0.18), (50.32, 0.29)),
            "noisy": ((89.64, None), (89.65, 0.06), (89.70, 0.07), (89.99, 0.08),
                      (89.81, 0.14), (87.918, 0.16)),
            "both": ((91.48, None), (91.45, 0.04), (91.41, 0.07), (91.15, 0.11),
                     (90.06, 0.14), (89.04, 0.21)),
            "stability": ((91.13, None), (91.16, 0.04), (91.24, 0.09), (91.26, 0.08),
                          (89.12, 0.15), (84.62, 0.21)),
            "robust": ((92.67, None), (92.70, 0.05), (92.68, 0.07), (92.61, 0.07),
                       (91.15, 0.20), (89.42, 0.11)),
        },
    ),
    "table2": AccuracyTable(
        "Table 2, SVHN (training noise 0.15)",
        (0, 5, 10, 20, 36, 42),
        {
            "normal": ((95.69, None), (95.41, 0.06), (94.32, 0.08), (86.85, 0.13),
                       (66.36, 0.21), (58.87, 0.16)),
            "noisy": ((93.42, None), (93.39, 0.03), (93.37, 0.04), (93.02, 0.07),
                      (91.64, 0.15), (90.39, 0.11)),
            "both": ((95.34, None), (95.25, 0.02), (94.96, 0.07), (93.94, 0.07),
                     (91.62, 0.09), (90.43, 0.08)),
            "stability": ((96.01, None), (95.93, 0.03), (95.63, 0.07), (94.59, 0.06),
                          (91.45, 0.14), (89.71, 0.07)),
            "robust": ((96.13, None), (96.06, 0.03), (95.91, 0.05), (95.17, 0.07),
                       (92.47, 0.09), (90.86, 0.08)),
        },
    ),
    "table3": AccuracyTable(
        "Table 3, road images (training noise 40/255)",
        (0, 10, 30, 40, 60),
        {
            "normal": ((96.84, None), (95.57, 0.28), (75.42, 1.08), (59.34, 1.28), (43.81, 1.02)),
            "noisy": ((91.58, None), (92.66, 0.41), (95.71, 0.24), (94.95, 0.62), (92.05, 0.84)),
            "both": ((96.31, None), (96.36, 0.35), (95.97, 0.58), (95.39, 0.73), (92.92, 0.46)),
            "stability": ((96.05, None), (96.31, 0.23), (94.63, 0.58), (92.92, 0.80),
                          (90.87, 0.69)),
            "robust": ((97.37, None), (97.29, 0.17), (96.71, 0.49), (95.52, 0.64), (93.65, 0.49)),
        },
    ),
    "table5_cifar10": AccuracyTable("Table 5, CIFAR-10, clean images alone", (0,), {
        "compact": ((93.43, None),), "margin": ((92.25, None),), "alpha_beta": ((94.01, None),),
        "gamma_0": ((93.66, None),), "gamma_1": ((93.81, None),)}),
    "table5_svhn": AccuracyTable("Table 5, SVHN, clean images alone", (0,), {
        "compact": ((96.15, None),), "margin": ((95.98, None),), "alpha_beta": ((96.64, None),),
        "gamma_0": ((96.55, None),), "gamma_1": ((96.67, None),)}),
}
"""Transcribed from Tables 1 to 3 and 5 of arXiv 2405.18499, where clean accuracy has no spread.

Rows of Table 5: alpha = 1 and beta = 0; alpha = 0 and beta = 1; both 1, all with gamma_reg = 1e-3;
both 1 with gamma_reg = 0 and 1.
"""


TABLE4 = PerturbationTable(
    "Table 4, road images",
    {
        "Occlusion": ((89.89, 0.49), (80.21, 1.02), (87.92, 0.68), (80.99, 1.19), (94.05, 0.75)),
        "Occlusion + Gaussian noise": (
            (27.68, 0.30), (74.00, 1.23), (78.60, 1.48), (54.07, 1.32), (82.73, 1.45)),
        "DU sampling": (
            (92.36, None), (86.58, None), (91.84, None), (96.05, None), (95.79, None)),
        "DU sampling + occlusion": (
            (77.58, 1.09), (78.86, 1.35), (81.34, 0.71), (74.47, 1.02), (88.05, 0.55)),
        "Stripe masking": (
            (84.39, 1.30), (76.21, 1.23), (88.00, 0.65), (86.63, 1.16), (90.42, 0.62)),
        "DU sampling + stripe masking": (
            (69.52, 1.62), (70.13, 1.33), (77.78, 1.06), (82.44, 0.99), (87.99, 1.53)),
    },
    ("normal", "noisy", "both", "stability", "robust"),
)
"""Transcribed from Table 4 of arXiv 2405.18499; down-up sampling alone has no randomness."""

published.TABLES.update(TABLES)
published.PERTURBATIONS["table3"] = TABLE4
