"""Simulate a small RELION project for the other examples.

    python examples/simulate.py FOLDER

It holds an Extract job (Extract/job001), a classification (Class2D/job002) and a Select job
(Select/job003) that kept the classes of the particles, a tenth of them wrongly. truth.csv tells
what each image really is.
"""

import argparse
from pathlib import Path

from relion_cryofilter.simulate import simulate_project, simulate_selection


def main() -> None:
    """Simulate and say where the project is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="new folder for the project")
    parser.add_argument("--micrographs", type=int, default=12)
    parser.add_argument("--particles", type=int, default=50, help="of each micrograph")
    arguments = parser.parse_args()
    particles = simulate_project(
        arguments.folder,
        n_micrographs=arguments.micrographs,
        particles_per_micrograph=arguments.particles,
        snr=0.1,
    )
    simulate_selection(particles)
    print(f"{arguments.folder} holds Extract/job001, Class2D/job002 and Select/job003.")


if __name__ == "__main__":
    main()
