"""The one list of operators that the tests of inverse problems run over, small enough for a matrix."""

import numpy as np

from jaxdiff import inverse

RNG = np.random.default_rng(3)
IMAGE, COLOUR = (6, 8), (4, 6, 2)
MASK = RNG.random(IMAGE) < 0.5
LOPSIDED = RNG.random((3, 5))
ANGLES = np.array([0.0, 0.4, 1.7])
# Rank 3 of 5 x 7.
LOW_RANK = RNG.normal(size=(5, 3)) @ RNG.normal(size=(3, 7))


TRANSPARENT = RNG.random((4, 6, 1)) < 0.6
WIDE, TALL = RNG.normal(size=(4, 9)), RNG.normal(size=(9, 6))

# name -> what makes it, in the precision that is on
CASES = {
    "inpainting": lambda: inverse.inpainting(MASK),
    "inpainting, colour": lambda: inverse.inpainting(TRANSPARENT, COLOUR),
    "fourier": lambda: inverse.fourier(MASK),
    "fourier, vector": lambda: inverse.fourier(np.arange(7) < 3),
    "box_down, colour": lambda: inverse.box_down(COLOUR, 2),
    "bicubic_down": lambda: inverse.bicubic_down(IMAGE, 2),
    "circular blur": lambda: inverse.blur(IMAGE, LOPSIDED),
    "circular blur, colour": lambda: inverse.blur(COLOUR, inverse.gaussian_kernel(3, 0.7)),
    "reflected blur": lambda: inverse.blur(IMAGE, LOPSIDED, "reflect"),
    "radon, colour": lambda: inverse.radon(COLOUR, ANGLES, detectors=4),
    "matrix, wide": lambda: inverse.matrix(WIDE),
    "matrix, tall": lambda: inverse.matrix(TALL, (2, 3)),
    "matrix, low rank": lambda: inverse.matrix(LOW_RANK),
    "composed": lambda: inverse.box_down(IMAGE, 2) @ inverse.blur(IMAGE, LOPSIDED),
}
ITERATED = {"reflected blur", "radon, colour", "composed"}
