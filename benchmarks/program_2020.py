"""What the 2020 program did to an image, written with scikit-image as it was."""

import numpy as np
from skimage.filters import gaussian, roberts
from skimage.transform import resize


def prepared(image: np.ndarray, dim: int, with_roberts: bool = True) -> np.ndarray:
    """Return network input (channels, dim, dim) float32 of one raw box."""
    small = resize(gaussian(image, sigma=3), (dim, dim))
    maps = [small, roberts(small)] if with_roberts else [small]
    return np.stack([(one - one.mean()) / one.std() for one in maps]).astype(np.float32)
