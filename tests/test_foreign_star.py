"""STAR files as other programs write them: read, scored and given back byte for byte.

The samples have the layout of each program's writer: pyem's csparc2star.py (asarnow/pyem),
cryoDRGN's write_star and filter (ml-struct-bio/cryodrgn), Topaz's particle_stack
(tbepler/topaz), Warp's and M's particle lists (warpem/warp), cisTEM's RELION export.
"""

from __future__ import annotations

import numpy as np
import pytest
from making import blobs, without_score, write_stack

from relion_cryofilter.commands.score import score
from relion_cryofilter.errors import StarError
from relion_cryofilter.options import ScoreOptions
from relion_cryofilter.particles.particles import read_particles

pytestmark = pytest.mark.usefixtures("without_report")

N = 12

CSPARC2STAR = """
data_optics

loop_
_rlnVoltage #1 
_rlnSphericalAberration #2 
_rlnAmplitudeContrast #3 
_rlnOpticsGroup #4 
_rlnImageSize #5 
_rlnImagePixelSize #6 
_rlnImageDimensionality #7 
_rlnOpticsGroupName #8 
300.000000 2.700000 0.100000 4 32 2.950000 2 opticsGroup4

data_particles

loop_
_rlnImageName #1 
_rlnMicrographName #2 
_rlnCoordinateX #3 
_rlnCoordinateY #4 
_rlnOriginX #5 
_rlnOriginY #6 
_rlnOriginXAngst #7 
_rlnOriginYAngst #8 
_rlnDefocusU #9 
_rlnOpticsGroup #10 
_rlnRandomSubset #11 
_ucsfUid #12 
"""  # noqa: W291

SAMPLES = {
    "csparc2star": (
        CSPARC2STAR,
        "{i:06d}@J19/extract/mic_particles.mrc J1/imported/mic{m}.mrc 812 1407 -3.842161 "
        "0.619705 -11.334375 1.828125 45591.371094 4 2 1549474855381294345{i}\n",
        "", "J19/extract/mic_particles.mrc", 2.95,
    ),
    "csparc2star for RELION 3.0": (
        "\ndata_images\n\nloop_\n_rlnImageName #1 \n_rlnMicrographName #2 \n_rlnDefocusU #3 \n"
        "_rlnDetectorPixelSize #4 \n_rlnMagnification #5 \n_rlnOriginX #6 \n",
        "{i:06d}@J19/extract/mic_particles.mrcs mic{m}.mrc 45591.37 2.95 10000.0 -3.842161\n",
        "", "J19/extract/mic_particles.mrcs", 2.95,
    ),
    "cryoDRGN": (
        "# Created 2024-05-20 17:39:07.660886\n\ndata_\n\nloop_\n_rlnImageName\n_rlnImageSize\n"
        "_rlnImagePixelSize\n_rlnDefocusU\n_rlnDefocusAngle\n_rlnVoltage\n_rlnPhaseShift\n",
        "{i}@particles.128.mrcs 32 2.95 15301.1 5.28 300.0 0.0\n", "", "particles.128.mrcs", 2.95,
    ),
    "cryoDRGN with optics": (
        "# Created 2024-05-20 17:39:07.660886\n\ndata_optics\n\nloop_\n_rlnOpticsGroup\n"
        "_rlnImagePixelSize\n_rlnImageSize\n_rlnMagMat00\n4 2.950000 32 1.0\n\n"
        "data_particles\n\nloop_\n_rlnImageName\n_rlnMicrographName\n_rlnOpticsGroup\n",
        "{i:06d}@particles.mrcs mic{m}.mrc 4\n", "\n", "particles.mrcs", 2.95,
    ),
    "Topaz": (
        "data_images\nloop_\n_rlnMicrographName #1\n_rlnCoordinateX #2\n_rlnCoordinateY #3\n"
        "_rlnAutopickFigureOfMerit #4\n_rlnImageName #5\n",
        "mic{m}\t2158\t3073\t-1.2345678\t{i:06d}@stack.mrcs\n", "", "stack.mrcs", None,
    ),
    "Warp": (
        "\ndata_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n_rlnImageName #3\n"
        "_rlnMicrographName #4\n_rlnMagnification #5\n_rlnDetectorPixelSize #6\n"
        "_rlnCtfMaxResolution #7\n_rlnBeamTiltClass #8\n",
        "  1904.123    212.550  {i:07d}@particles/mic_2.95A.mrcs  mic{m}.mrc  10000.0  2.950000"
        "  3.21  1\n",
        "", "particles/mic_2.95A.mrcs", 2.95,
    ),
    "M": (
        "\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n"
        "_rlnImagePixelSize #3\n_rlnImageSize #4\n  4  opticsGroup4  2.9500  32\n\n\n"
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnOpticsGroup #3\n"
        "_wrpParticleID #4\n_wrpDoseSum #5\n",
        "  {i}@../sub/mic.mrcs  mic{m}.tomostar  4  {i}  31.5\n", "\n", "sub/mic.mrcs", 2.95,
    ),
    "cisTEM": (
        " \ndata_\n \nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnDefocusU #3\n"
        "_rlnVoltage #4\n_rlnMagnification #5\n_rlnDetectorPixelSize #6\n",
        "{i:06d}@stack.mrcs mic{m}.mrc 15301.1  300 10000 2.95\n", "", "stack.mrcs", 2.95,
    ),
}  # fmt: skip


@pytest.fixture(params=SAMPLES)
def sample(request, project, monkeypatch):
    """A project as that program leaves it: text, path of the STAR file, expected pixel size."""
    head, row, tail, stack, pixel_size = SAMPLES[request.param]
    text = head + "".join(row.format(i=i, m=i % 4) for i in range(1, N + 1)) + tail
    path = project / "P1/J20/x.star" if "J19" in stack else project / "P1/x.star"
    if "../" in row:
        path = project / "P1/list/x.star"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    write_stack(project / "P1" / stack, blobs(N, 32))
    return text, path, pixel_size


@pytest.mark.slow
def test_a_sample_is_scored_and_comes_back_byte_for_byte(sample, project):
    text, path, pixel_size = sample
    particles = read_particles(path)
    assert len(particles) == N
    assert particles.index.tolist() == list(range(N))
    [group] = particles.optics
    assert group.pixel_size_angstrom == (pixel_size and pytest.approx(pixel_size))
    score(ScoreOptions(in_parts=path, o="out", weights="model.safetensors", threshold=0.5, j=1))
    found = np.loadtxt(project / "out/scores.csv", delimiter=",")[:, 1]
    score(ScoreOptions(mrc=particles.stacks, o="plain", weights="model.safetensors", j=1))
    assert (found == np.loadtxt(project / "plain/scores.csv", delimiter=",")[:, 1]).all()
    out = (project / "out/particles.star").read_bytes()
    assert without_score(out) == text.encode()
    rows = [line for line in text.splitlines() if "@" in line]
    parts = [(project / f"out/particles_{name}.star") for name in ("accepted", "rejected")]
    kept = [line for part in parts for line in part.read_text().splitlines() if "@" in line]
    assert sorted(line.rsplit(None, 1)[0].rstrip() for line in kept) == sorted(
        line.rstrip() for line in rows
    )


def test_micrographs_have_the_names_that_the_program_gives(sample):
    _, path, _ = sample
    particles = read_particles(path)
    assert len(particles.micrographs) == (4 if particles.has_micrographs else 1)


def test_cistems_own_parameter_file_is_refused_with_what_is_needed(tmp_path):
    path = tmp_path / "x.star"
    path.write_text(
        "# Written by cisTEM\n\ndata_\n\nloop_\n_cisTEMPositionInStack #1\n_cisTEMAnglePsi #2\n"
        "#   POSITION   PSI\n   1   12.5\n   2   0.1\n"
    )
    with pytest.raises(StarError, match=r"no particles found\. Expected a loop_ with _rln"):
        read_particles(path)
