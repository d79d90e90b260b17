"""Calibration metrics retyped from their publications, in NumPy and float64, without sharing any step with the code."""

import math

import numpy as np


def smooth_ece(confidence, correct, grid=4000):
    """Błasiok and Nakkiran 2023: images of a Gaussian reflected at 0 and 1, and bisection for the bandwidth."""
    t = (np.arange(grid) + 0.5) / grid

    def error(bandwidth):
        images = [sign * confidence + 2 * turn for turn in range(-2, 3) for sign in (1, -1)]
        density = sum(np.exp(-((t[:, None] - image[None]) ** 2) / (2 * bandwidth**2)) for image in images)
        density /= math.sqrt(2 * math.pi) * bandwidth
        return np.abs(density @ (correct - confidence) / len(confidence)).mean()

    low, high = 0.001, 1.0
    if error(low) < low:
        return error(low)
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return error((low + high) / 2)


def adaptive_ece(confidence, correct, num_bins):
    """Equal parts of the examples in order of confidence, for distinct confidences and N a multiple of the bins."""
    order = np.argsort(confidence)
    parts = np.split(order, num_bins)
    return sum(abs(correct[part].mean() - confidence[part].mean()) for part in parts) / num_bins


def classwise_ece(probabilities, target, num_bins):
    """Kull et al. 2019: mean over the classes of the one-against-rest ECE, bins (lo, hi]."""
    errors = []
    for label in range(probabilities.shape[1]):
        p, hit = probabilities[:, label], target == label
        index = np.maximum(np.ceil(p * num_bins).astype(int) - 1, 0)
        bins = [index == b for b in range(num_bins)]
        errors.append(sum(b.mean() * abs(p[b].mean() - hit[b].mean()) for b in bins if b.any()))
    return np.mean(errors)
