"""A million-row STAR file: read and written in three, beside relion_star_handler and starfile.

    python benchmarks/star.py --work FOLDER [--n 1000000]

Makes particles.star with 30 columns (440 MB) once. Each line is a process of its own; seconds
are user and system time, start-up included. relion_star_handler only adds a column and writes
one file; this program writes the whole set with scores and its two subsets.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

LABELS = (  # noqa: SIM905
    "CoordinateX CoordinateY AutopickFigureOfMerit ClassNumber AnglePsi ImageName MicrographName "
    "OpticsGroup CtfMaxResolution CtfFigureOfMerit DefocusU DefocusV DefocusAngle CtfBfactor "
    "CtfScalefactor PhaseShift GroupNumber AngleRot AngleTilt OriginXAngst OriginYAngst "
    "NormCorrection LogLikeliContribution MaxValueProbDistribution NrOfSignificantSamples "
    "RandomSubset GroupName BeamTiltClass HelicalTubeID AnglePsiPrior"
).split()
PER_MICROGRAPH = 200
HEAD = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3
_rlnImageSize #4
_rlnImageDimensionality #5
           1 opticsGroup1     1.770000          256            2


# version 30001

data_particles

loop_
"""
OURS = """
import sys
from pathlib import Path
import numpy as np
from relion_cryofilter.files import ACCEPTED, ALL, REJECTED
from relion_cryofilter.particles.particles import read_particles
particles, out = read_particles(sys.argv[1]), Path(sys.argv[2])
scores = np.random.default_rng(0).random(len(particles))
accepted = scores > 0.4
subsets = {ACCEPTED: accepted, REJECTED: ~accepted, ALL: np.ones_like(accepted)}
particles.table.write({out / name: mask for name, mask in subsets.items()}, scores)
"""
STARFILE = """
import sys
import starfile
tables = starfile.read(sys.argv[1])
tables["particles"]["rlnParticleFigureOfMerit"] = 0.5
starfile.write(tables, sys.argv[2] + "/starfile.star")
"""


def make(path: Path, n: int) -> None:
    """Write the file in RELION's layout, unless it is there."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write(HEAD)
        file.writelines(f"_rln{label} #{number} \n" for number, label in enumerate(LABELS, 1))
        for micrograph in range(n // PER_MICROGRAPH):
            for image, numbers in enumerate(rng.normal(0, 1000, (PER_MICROGRAPH, 26)), 1):
                words = [f"{number:12.6f}" for number in numbers]
                words.insert(5, f"{image:06d}@Extract/job007/Movies/mic_{micrograph:05d}.mrcs")
                words.insert(6, f"MotionCorr/job002/Movies/mic_{micrograph:05d}.mrc")
                words.insert(7, f"{1:12d}")
                file.write(" ".join([*words, "group1"]) + " \n")
        file.write(" \n")


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its peak memory in MB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Make the file, run the programs, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/star.md"))
    options = parser.parse_args()
    source, out = options.work / f"particles_{options.n}.star", options.work / "star_out"
    out.mkdir(parents=True, exist_ok=True)
    make(source, options.n)
    places = [str(source), str(out)]
    runs = {
        "relion_cryofilter: read, three outputs": [sys.executable, "-c", OURS, *places],
        "starfile: read, one output": [sys.executable, "-c", STARFILE, *places],
    }
    if shutil.which("relion_star_handler"):
        runs["relion_star_handler --add_column: read, one output"] = [
            "relion_star_handler", "--i", str(source), "--o", f"{out}/handler.star",
            "--add_column", "rlnParticleFigureOfMerit", "--add_column_value", "0.5",
        ]  # fmt: skip
    lines, ours = [], 0.0
    for name, command in runs.items():
        seconds, megabytes = timed(command)
        ours = ours or seconds
        lines.append(f"| {name} | {seconds:.1f} | {megabytes:,.0f} | {ours / seconds:.2f} |")
        print(lines[-1], flush=True)
    rows = {name: sum(1 for _ in (out / name).open("rb")) for name in
            ("particles.star", "particles_accepted.star", "particles_rejected.star")}  # fmt: skip
    head = (
        f"# A STAR file of {options.n:,} rows and {len(LABELS)} columns\n\nMade by "
        f"`benchmarks/star.py` ({source.stat().st_size / 1e6:,.0f} MB, Python "
        f"{platform.python_version()}). Lines written: {rows}.\n\n"
        "| program | CPU seconds | peak MB | ours / this |\n|---|---|---|---|\n"
    )
    options.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
