"""The direction from which each particle is seen, in RELION's and in CryoSPARC's terms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def views_of_angles(rot_degrees: NDArray[Any], tilt_degrees: NDArray[Any]) -> Floats:
    """Return the viewing directions (n, 3) of RELION's angles (n,), NaN where there is none.

    The third row of RELION's rotation matrix, ``Euler_angles2direction`` of src/euler.cpp, the
    same in 3.1, 4 and 5: a point of the map in this direction is projected onto the middle.
    """
    rot, tilt = (np.deg2rad(np.asarray(a, np.float64)) for a in (rot_degrees, tilt_degrees))
    return np.stack([np.cos(rot) * np.sin(tilt), np.sin(rot) * np.sin(tilt), np.cos(tilt)], axis=1)


def views_of_poses(poses: NDArray[Any]) -> Floats:
    """Return the viewing directions (n, 3) of CryoSPARC's poses (n, 3), axis times radians.

    RELION's rotation matrix is that of the pose turned back (pyem, ``geom.expmap``), so its third
    row is what the pose makes of the z axis.
    """
    from scipy.spatial.transform import Rotation  # slow to import

    return np.asarray(Rotation.from_rotvec(poses).apply((0, 0, 1)))
