"""Score the particles of a STAR file in a notebook's way, and look at them by micrograph.

    python examples/score_table.py Extract/job007/particles.star scored.star

Needs starfile (pip install starfile). Run it in the RELION project, which image paths start from.
`relion_cryofilter score` copies rows byte for byte; this way they pass through pandas.
"""

import sys

import starfile

from relion_cryofilter import score_images


def main(source: str, result: str) -> None:
    """Write the accepted particles of `source`, with their scores, to `result`."""
    tables = starfile.read(source, always_dict=True)
    scores = score_images(tables, threshold="keep=0.6")
    particles = scores.to_frame()
    print(f"{scores.accepted.sum()} of {len(scores)} accepted, from {scores.threshold:.3f} on")
    by_micrograph = particles.groupby("rlnMicrographName")["rlnParticleFigureOfMerit"]
    print(by_micrograph.agg(["size", "median"]).sort_values("median").head())
    starfile.write({**tables, "particles": particles[scores.accepted]}, result)


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main(*sys.argv[1:])
