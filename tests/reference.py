"""The paper's equations in plain NumPy and float64, written for reading, not for speed.

Everything is a loop over classes and examples, straight from the equations. ``W`` is [C, d] as in
the paper (the transpose of a Flax kernel), ``centroids`` a dictionary from class to centroid.
"""

import math

import numpy as np


def relu(value):
    """[q]_+ below Eq. 8."""
    return max(0.0, value)


def classes_in(labels, num_classes):
    """C_B: the classes that occur in the batch."""
    return [c for c in range(num_classes) if c in list(labels)]


def members(values, labels, c):
    """C_c^B: the rows of the batch that belong to class c."""
    return [value for value, label in zip(values, labels, strict=True) if label == c]


def softmax_loss(logits, labels):
    """Eq. 3 with Eq. 2 and 4."""
    losses = []
    for z, y in zip(logits, labels, strict=True):
        sigma = [math.exp(z_i) / sum(math.exp(z_j) for z_j in z) for z_i in z]
        losses.append(-math.log(sigma[y]))
    return sum(losses) / len(losses)


def weighted_softmax_loss(logits, labels, weights):
    """The same with a weight for each class, over the sum of the weights."""
    total = sum(weights[y] * softmax_loss([z], [y]) for z, y in zip(logits, labels, strict=True))
    return total / sum(weights[y] for y in labels)


def unit(vector):
    """The direction of a vector."""
    return vector / np.linalg.norm(vector)


def naive_centroids(features, labels, num_classes):
    """Section 4.4, the naive way: means over the batch."""
    centroids = {}
    for c in classes_in(labels, num_classes):
        rows = members(features, labels, c)
        centroids[c] = sum(rows) / len(rows)
    return centroids


def momentum_centroids(features, labels, num_classes, previous, gamma):
    """Section 4.4, using momentum; ``previous`` has the classes that were seen before.

    A class without a previous centroid starts at its batch mean; an absent one is not listed.
    """
    centroids = naive_centroids(features, labels, num_classes)
    for c in centroids:
        if c in previous:
            centroids[c] = gamma * previous[c] + (1 - gamma) * centroids[c]
    return centroids


def stored_centroids(features, labels, num_classes, previous, gamma):
    """What the next batch finds as m^{t-1}: absent classes keep what they had."""
    return {**previous, **momentum_centroids(features, labels, num_classes, previous, gamma)}


def moved_centroids(features, noisy_features, labels, centroids):
    """The centroids of the noisy view: each m_c, moved by the mean of q(x') - q(x) over its class.
    """
    moved = {}
    for c, m in centroids.items():
        pairs = zip(members(noisy_features, labels, c), members(features, labels, c), strict=True)
        differences = [noisy - clean for noisy, clean in pairs]
        moved[c] = m + sum(differences) / len(differences)
    return moved


def compactness(features, labels, centroids, delta_v, squared=True, linear_beyond=math.inf):
    """Eq. 8; with the features of noisy images Eq. 12.

    A squared hinge above ``linear_beyond`` goes on as the tangent there.
    """
    total = 0.0
    for c in centroids:
        rows = members(features, labels, c)
        inner = 0.0
        for q in rows:
            hinge = relu(np.linalg.norm(centroids[c] - q) - delta_v)
            if squared and hinge > linear_beyond:
                inner += linear_beyond**2 + 2 * linear_beyond * (hinge - linear_beyond)
            else:
                inner += hinge**2 if squared else hinge
        total += inner / len(rows)
    return total / len(centroids) if centroids else 0.0


def boundary_distance(q, c, i, W, b):
    """Eq. 10: the distance of a point to P_ci."""
    return abs(np.dot(W[c] - W[i], q) + (b[c] - b[i])) / np.linalg.norm(W[c] - W[i])


def margin_hinges(m, c, W, b, delta_d):
    """The hinges of Eq. 9 for one centroid, by the other class i."""
    z = W @ m + b
    return {i: relu(delta_d + boundary_distance(m, c, i, W, b) * np.sign(z[i] - z[c]))
            for i in range(len(b)) if i != c}


def margin(centroids, W, b, delta_d, squared=False, boundaries="max"):
    """Eq. 9; squared and averaged over the boundaries as its text and Appendix A.1 discuss."""
    total = 0.0
    for c, m in centroids.items():
        hinges = list(margin_hinges(m, c, W, b, delta_d).values())
        if squared:
            hinges = [hinge**2 for hinge in hinges]
        total += max(hinges) if boundaries == "max" else sum(hinges) / len(hinges)
    return total / len(centroids) if centroids else 0.0


def centroid_norm(centroids):
    """Eq. 11."""
    return sum(np.linalg.norm(m) for m in centroids.values()) / max(len(centroids), 1)


def clean_loss(compact, margin_term, norm, alpha, beta, gamma_reg):
    """Eq. 7."""
    return alpha * compact + beta * margin_term + gamma_reg * norm


def our_loss(clean, noisy, lam):
    """Eq. 13."""
    return clean + lam * noisy


def stability(features, noisy_features):
    """Section 7.1: the mean of ||f(x) - f(x + noise)||."""
    distances = [np.linalg.norm(q - noisy)
                 for q, noisy in zip(features, noisy_features, strict=True)]
    return sum(distances) / len(distances)


def dispersion(features, labels, c):
    """Definition 3.1; 0 for fewer than two examples."""
    rows = members(features, labels, c)
    return max((np.linalg.norm(q1 - q2) for q1 in rows for q2 in rows), default=0.0)


def class_margin(features, labels, c, W, b):
    """Definition 5.1; infinite without an example."""
    return min((boundary_distance(q, c, i, W, b) for q in members(features, labels, c)
                for i in range(len(b)) if i != c), default=math.inf)


def release_compactness(features, noisy_features, labels, centroids, delta_v):
    """The authors' release: one mean over a class's clean and noisy features together."""
    total = 0.0
    for c in centroids:
        rows = members(features, labels, c) + members(noisy_features, labels, c)
        total += sum(relu(np.linalg.norm(centroids[c] - q) - delta_v)**2 for q in rows) / len(rows)
    return total / len(centroids)
