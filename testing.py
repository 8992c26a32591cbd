"""What several test files share: random tensors, pictures, and bounds for counts."""

import ast
import math
import os

import torch
from hypothesis import strategies as st
from PIL import Image

seeds = st.integers(0, 2**31 - 1)
sizes = st.permutations(range(4, 10)).map(lambda p: p[:3])  # N, H, W: small, and no two are equal


def rng(seed):
    return torch.Generator().manual_seed(seed)


def noise(n, H, W, seed):
    return torch.randint(256, (n, 3, H, W), generator=rng(seed), dtype=torch.uint8)


def key(image):
    """The bytes of an image: what a Counter counts."""
    return image.contiguous().numpy().tobytes()


def assert_rate(count, n, p):
    """A binomial count within 6 standard deviations: false alarm 2e-9 (used where n p >= 50)."""
    assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p)), f"{count} of {n}, expected {n * p}"


def assert_frequencies(counts, expected):
    """Only the expected keys occur, and at their shares: chi-square with d degrees of freedom is
    above d + 2 sqrt(20 d) + 40 with a chance below exp(-20) = 2e-9 (Laurent and Massart 2000)."""
    assert set(counts) <= set(expected), f"{len(set(counts) - set(expected))} foreign outcomes"
    n, d = sum(counts.values()), len(expected) - 1
    chi2 = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < d + 2 * math.sqrt(20 * d) + 40, f"chi-square {chi2:.0f} at {d} degrees of freedom"


def write_picture(path, image, **options):
    """uint8 (3, H, W) as a file; PNG and BMP keep every bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)


class Payload:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def imports(nodes):
    """The top-level names of the modules that are imported in these syntax trees."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names
