"""Score once, with a progress line, and compare what thresholds would accept.

python examples/compare_thresholds.py Extract/job007/particles.star model.safetensors
"""

import sys

from relion_cryofilter import score_images


def tell(what: str, done: int, total: int) -> None:
    """Show how far the work is; an exception from here would end it."""
    print(f"\r{done} of {total} {what}", end="" if done < total else "\n", flush=True)


def main(source: str, *models: str) -> None:
    """Print how many particles each threshold accepts; several models are averaged."""
    scores = score_images(source, models or None, progress=tell)
    print(f"The model's own threshold {scores.threshold:g} accepts {scores.accepted.sum()}.")
    frame = scores.to_frame()
    for threshold in (0.2, 0.4, 0.6, 0.8):
        kept = frame[frame["rlnParticleFigureOfMerit"] >= threshold]
        micrographs = kept["rlnMicrographName"].nunique()
        print(f"{threshold:.1f}: {len(kept):6} particles on {micrographs} micrographs")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main(*sys.argv[1:])
