"""Slow, plain authors of every method, written from the papers in float64, one entry or one matrix at a time.

Nothing here is shared with the code under test. `deltas` is a list of k arrays of one shape.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def average(deltas, alphas):
    return sum(a * d for a, d in zip(alphas, deltas, strict=True)) / sum(alphas)


def task_arithmetic(deltas, alphas):
    return sum(a * d for a, d in zip(alphas, deltas, strict=True))


def trim(delta, density):
    flat = sorted((abs(float(x)) for x in np.ravel(delta)), reverse=True)
    threshold = flat[max(1, round(density * len(flat))) - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def disjoint_merge(trimmed, alphas, sign="mass", combine="mean"):
    out = np.zeros(trimmed[0].shape)
    for index in np.ndindex(out.shape):
        terms = [(a * float(t[index]), abs(a)) for a, t in zip(alphas, trimmed, strict=True)]
        vote = sum(v for v, _ in terms) if sign == "mass" else sum(np.sign(v) for v, _ in terms)
        agreeing = [(v, a) for v, a in terms if v * vote > 0]
        if agreeing:
            out[index] = sum(v for v, _ in agreeing) / (sum(a for _, a in agreeing) if combine == "mean" else 1)
    return out


def ties(deltas, alphas, density=0.2, sign="mass", combine="mean"):
    return disjoint_merge([trim(d, density) for d in deltas], alphas, sign, combine)


def breadcrumbs(deltas, alphas, density=0.9, gamma=0.01):
    kept = []
    for delta in deltas:
        order = sorted(range(delta.size), key=lambda i: -abs(float(delta.flat[i])))
        first = round(gamma * delta.size) if delta.size > 1 else 0
        mask = np.zeros(delta.size, bool)
        mask[order[first : first + max(1, round(density * delta.size))]] = True
        kept.append(np.where(mask.reshape(delta.shape), delta, 0))
    return task_arithmetic(kept, alphas)


def sce(deltas, alphas, density=0.1, combine="mean"):
    stacked = np.stack(deltas)
    spread = stacked.var(axis=0)
    wanted = max(1, round(density * spread.size))
    chosen = spread >= np.sort(spread, axis=None)[::-1][wanted - 1]
    energy = [a * (d[chosen] ** 2).sum() for a, d in zip(alphas, deltas, strict=True)]
    out = np.zeros(spread.shape)
    for index in np.ndindex(out.shape):
        values = [float(d[index]) for d in deltas]
        vote = sum(values)
        agreeing = [(e, v) for e, v in zip(energy, values, strict=True) if v * vote > 0]
        if chosen[index] and sum(e for e, _ in agreeing) > 0:
            whole = sum(e for e, _ in agreeing) if combine == "mean" else sum(energy)
            out[index] = sum(e * v for e, v in agreeing) / whole
    return out


def angle(a, b):
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


def slerp(models, alphas):
    one, two = (m.ravel() for m in models)
    t = alphas[1] / sum(alphas)
    omega = angle(one, two)
    if omega < 1e-12 or math.pi - omega < 1e-12:
        return ((1 - t) * one + t * two).reshape(models[0].shape)
    both = math.sin((1 - t) * omega) * one + math.sin(t * omega) * two
    return (both / math.sin(omega)).reshape(models[0].shape)


def karcher(models, alphas):
    alphas = np.asarray(alphas) / sum(alphas)
    units = [m.ravel() / np.linalg.norm(m) for m in models]
    u = sum(a * x for a, x in zip(alphas, units, strict=True))
    if u.size == 1 and len({float(x[0]) for x in units}) > 1:
        return average(models, alphas)
    u = u / np.linalg.norm(u)
    for _ in range(500):
        step = np.zeros(u.shape)
        for a, x in zip(alphas, units, strict=True):
            across = x - (x @ u) * u
            if np.linalg.norm(across) > 0:
                step += a * angle(u, x) * across / np.linalg.norm(across)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        u = math.cos(size) * u + math.sin(size) * step / size
    length = sum(a * np.linalg.norm(m) for a, m in zip(alphas, models, strict=True))
    return (length * u).reshape(models[0].shape)


def model_stock(deltas, alphas):
    k = len(deltas)
    cosines = []
    for a, b in itertools.combinations(deltas, 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(float((a * b).sum() / norms) if norms else 0.0)
    cosine = float(np.mean(cosines))
    t = min(1.0, max(0.0, k * cosine / (1 + (k - 1) * cosine))) if cosine > 0 else 0.0
    return t * average(deltas, alphas)


def clip(deltas, norms=None):
    norms = [np.linalg.norm(d) for d in deltas] if norms is None else norms
    median = np.median([n for n in norms if n > 0] or [0])
    return [d * min(1.0, median / n) if n > 0 else d for d, n in zip(deltas, norms, strict=True)]


def equal(deltas, norms=None):
    norms = [np.linalg.norm(d) for d in deltas] if norms is None else norms
    median = np.median([n for n in norms if n > 0] or [0])
    return [d * median / n if n > 0 else d for d, n in zip(deltas, norms, strict=True)]


def trimmed_mean(deltas, alphas, trim=0.2):
    ordered, cut = np.sort(np.stack(clip(deltas)), axis=0), int(trim * len(deltas))
    return ordered[cut : len(deltas) - cut].mean(axis=0)


def median(deltas, alphas):
    return np.median(np.stack(clip(deltas)), axis=0)


def geometric_median(deltas, alphas):
    """Minimise the sum of distances by plain Weiszfeld steps in the full space, very many of them."""
    deltas = clip(deltas)
    z = average(deltas, alphas)
    for _ in range(2000):
        pulls = [a / max(1e-12, np.linalg.norm(z - d)) for a, d in zip(alphas, deltas, strict=True)]
        z, before = average(deltas, pulls), z
        if np.linalg.norm(z - before) < 1e-10 * np.linalg.norm(z):
            break
    return z


def multi_krum(deltas, alphas, faulty=1):
    deltas, k = equal(deltas), len(deltas)
    scores = []
    for i, a in enumerate(deltas):
        distances = sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(deltas) if j != i)
        scores.append(sum(distances[: k - faulty - 2]))
    chosen = sorted(range(k), key=lambda i: scores[i])[: k - faulty]
    return average([deltas[i] for i in chosen], [alphas[i] for i in chosen])


def iso_c(deltas, alphas):
    if deltas[0].ndim != 2:
        return average(deltas, alphas)
    u, s, v = np.linalg.svd(task_arithmetic(deltas, alphas), full_matrices=False)
    return s.mean() * u @ v


def tsv(deltas, alphas):
    if deltas[0].ndim != 2:
        return average(deltas, alphas)
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [np.linalg.svd(a * d, full_matrices=False) for a, d in zip(alphas, deltas, strict=True)]
    u = np.hstack([p[0][:, :rank] for p in parts])
    s = np.hstack([p[1][:rank] for p in parts])
    v = np.vstack([p[2][:rank] for p in parts])

    def whiten(x):  # the paper's closed form: X (XᵀX)^(-1/2)
        values, vectors = np.linalg.eigh(x.T @ x)
        return x @ vectors @ np.diag(values**-0.5) @ vectors.T

    if u.shape[1] > min(deltas[0].shape):
        return None
    return whiten(u) @ np.diag(s) @ whiten(v.T).T


def fisher(deltas, alphas, fishers, floor=1e-6):
    weights = [a * np.maximum(f, floor) for a, f in zip(alphas, fishers, strict=True)]
    return sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)


def regmean(deltas, alphas, grams, shrink=0.9):
    damped = []
    for a, gram in zip(alphas, grams, strict=True):
        gram = gram.copy()
        for i, j in itertools.permutations(range(len(gram)), 2):
            gram[i, j] *= shrink
        damped.append(a * gram)
    return (np.linalg.inv(sum(damped)) @ sum(g @ d.T for g, d in zip(damped, deltas, strict=True))).T
