"""RELION's column labels, as they stand in STAR files without their underscore."""

IMAGE_NAME = "rlnImageName"
MICROGRAPH_NAME = "rlnMicrographName"
OPTICS_GROUP = "rlnOpticsGroup"
IMAGE_PIXEL_SIZE = "rlnImagePixelSize"
IMAGE_SIZE = "rlnImageSize"
IMAGE_DIMENSIONALITY = "rlnImageDimensionality"
CLASS_NUMBER = "rlnClassNumber"

SCORE_LABEL = "rlnParticleFigureOfMerit"
"""RELION's own label for how good a particle is; select, sort and histogram work on it."""

COORDINATES = ("rlnCoordinateX", "rlnCoordinateY")
DEFOCUS = ("rlnDefocusU", "rlnDefocusV")
CTF_MAX_RESOLUTION = "rlnCtfMaxResolution"
AUTOPICK_FIGURE_OF_MERIT = "rlnAutopickFigureOfMerit"
