"""STAR text as RELION reads it: blocks, labels, rows as bytes, column values.

Rows are bytes from the input to the output. They are never parsed into numbers and printed
again, because that changes them: ``2.500000e-07`` becomes ``0.000000``, ``0012`` becomes ``12``.
Files are streamed, so memory does not depend on the number of rows or their width: see
`star_layout` (where things stand), `star_rows` (what they are) and `star_writing`.

Reference: S. R. Hall, "The STAR File", J. Chem. Inf. Comput. Sci. 31, 326 (1991); the dialect is
the one that RELION 3.0 to 5 reads.
"""

from __future__ import annotations

from relion_cryofilter.data.star_labels import IMAGE_DIMENSIONALITY, IMAGE_NAME
from relion_cryofilter.data.star_layout import Loop, StarFile, read_star
from relion_cryofilter.data.star_rows import TOKEN, column_chunks, columns, row_chunks, tokens
from relion_cryofilter.errors import StarError

__all__ = [
    "TOKEN", "Loop", "StarFile", "column_chunks", "columns", "particle_loop", "read_star",
    "row_chunks", "tokens",
]  # fmt: skip

_TOMO_LABELS = ("rlnTomoParticleName", "rlnTomoParticleId", "rlnTomoVisibleFrames")
_OPTIMISATION_SET_LABELS = ("rlnTomoParticlesFile", "rlnTomoTomogramsFile")


def particle_loop(star: StarFile) -> Loop:
    """Return the loop that holds the particles of `star`, as RELION would choose it.

    Raises
    ------
    StarError
        There is none or more than one, it is empty, RELION would not read it whole, or the file
        holds subtomograms.
    """
    _refuse_tomograms(star)
    loops = [loop for loop in star.loops if IMAGE_NAME in loop.labels and loop.block != "optics"]
    named = [loop for name in ("particles", "images") for loop in loops if loop.block == name]
    if not loops:
        raise StarError(f"{star.path}: no particles found. {_what_instead(star)}")
    if len(loops) > 1 and len(named) != 1:
        blocks = ", ".join(f"data_{loop.block}" for loop in loops)
        raise StarError(
            f"{star.path}: {len(loops)} loops hold _{IMAGE_NAME} ({blocks}); expected one, or one "
            "that is called data_particles. Split the file."
        )
    loop = named[0] if named else loops[0]
    for table in (star.loop("optics"), loop):
        if table is not None and table.fault:
            raise StarError(f"{star.path}, {table.fault}. Mend the file, then run this again.")
    if not loop.n_rows:
        raise StarError(f"{star.path}: data_{loop.block} has no rows, so there is nothing to do.")
    return loop


def _refuse_tomograms(star: StarFile) -> None:
    labels = {label for loop in star.loops for label in loop.labels} | set(star.pairs)
    cure = "This program scores single-particle images only."
    if any(label in labels for label in _OPTIMISATION_SET_LABELS):
        raise StarError(f"{star.path}: a tomography optimisation set, not particles. {cure}")
    stacks = star.pairs.get("rlnTomoSubTomosAre2DStacks", "0")
    if stacks.split()[:1] == ["1"] or any(label in labels for label in _TOMO_LABELS):
        raise StarError(f"{star.path}: holds subtomograms (a tomography file). {cure}")
    optics = star.loop("optics")
    if optics is None or IMAGE_DIMENSIONALITY not in optics.labels:
        return
    values = {value for (value,) in columns(star, optics, [IMAGE_DIMENSIONALITY])}
    if values & {"3", "3.0", "3.000000"}:
        raise StarError(
            f"{star.path}: {IMAGE_DIMENSIONALITY} is 3 in data_optics, so the images are "
            f"volumes. {cure}"
        )


def _what_instead(star: StarFile) -> str:
    if IMAGE_NAME in star.pairs:
        return f"_{IMAGE_NAME} is a single value there; expected a loop_ with one row a particle."
    blocks = ", ".join(f"data_{loop.block} ({loop.n_rows} rows)" for loop in star.loops)
    return (
        f"Expected a loop_ with _{IMAGE_NAME}; found {blocks or 'no loops'}. "
        "Give the particles.star of an Extract, Select, Class2D or Refine3D job."
    )
