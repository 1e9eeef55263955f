"""Train on a table with labels, measure on micrographs that were kept back, and keep the model.

    python examples/train_table.py Extract/job007/particles.star truth.csv model.safetensors

truth.csv has the columns image and real (1 for particles), as `relion_cryofilter demo` writes it.
"""

import sys

import pandas as pd
import starfile

from relion_cryofilter import evaluate_model, train_model


def good_and_bad(particles: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the two kinds of particles."""
    return particles[particles["real"]], particles[~particles["real"]]


def main(source: str, truth: str, result: str) -> None:
    """Train on the particles of two thirds of the micrographs, measure on the others."""
    particles = starfile.read(source, always_dict=True)["particles"]
    real = pd.read_csv(truth).set_index("image")["real"].astype(bool)
    particles["real"] = particles["rlnImageName"].map(real)
    micrographs = sorted(particles["rlnMicrographName"].unique())
    known = particles["rlnMicrographName"].isin(micrographs[: 2 * len(micrographs) // 3])

    training = train_model(*good_and_bad(particles[known]), epochs=3, seed=1)
    print(training.history()[["epoch", "train_loss", "val_auc"]].to_string(index=False))
    figures = evaluate_model(*good_and_bad(particles[~known]), training.models)
    print(f"AUC {figures.auc} on {figures.n} particles of {figures.n_groups} new micrographs")
    training.models[0].save(result)


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main(*sys.argv[1:])
