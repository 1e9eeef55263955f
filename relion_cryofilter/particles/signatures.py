"""What a file is, by its first bytes, whatever its name says; and what to do with such a file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from relion_cryofilter.inputs import open_input

FIRST_BYTES = 1024
"""So many are looked at; an MRC header has as many."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file: in words, with the cure where another one was expected."""

    words: str
    cure: str = "Give the file that was meant."

    def __str__(self) -> str:
        return f"{self.words}. {self.cure}"


STAR = FileKind("a STAR file", "Give it as --in_parts, or as --pos or --neg.")
IMAGES = FileKind(
    "an MRC image file",
    "Give it as --mrc (score), or as --pos or --neg (train and metrics).",
)
CRYOSPARC = FileKind("a CryoSPARC dataset (.cs)", "Give it as --in_parts, or as --pos or --neg.")
MODEL = FileKind("a model file (safetensors)", "Give it as --weights, or to train as --init.")
HDF5 = FileKind(
    "an HDF5 file",
    "If it is a Keras model, give it as --weights; if it holds images, convert them to an MRC "
    "stack.",
)
_PICTURE = "Particle images are MRC stacks: convert it, e.g. with relion_image_handler or e2proc2d."
_SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": HDF5,
    b"\x93NUMPY": CRYOSPARC,
    b"\x94CSDAT": CRYOSPARC,
    b"\x1f\x8b": FileKind("compressed (gzip)", "Unpack it first, with gunzip."),
    b"BZh": FileKind("compressed (bzip2)", "Unpack it first, with bunzip2."),
    b"\xfd7zXZ": FileKind("compressed (xz)", "Unpack it first, with unxz."),
    b"\x28\xb5\x2f\xfd": FileKind("compressed (zstd)", "Unpack it first, with unzstd."),
    b"PK\x03\x04": FileKind("a zip archive", "Unpack it, or give the file that was meant."),
    b"%PDF": FileKind("a PDF"),
    b"\x89PNG": FileKind("a picture (PNG)", _PICTURE),
    b"\xff\xd8\xff": FileKind("a picture (JPEG)", _PICTURE),
    b"II*\0": FileKind("a TIFF file", _PICTURE),
    b"MM\0*": FileKind("a TIFF file", _PICTURE),
    b"II+\0": FileKind("a TIFF file", _PICTURE),
    b"\xff\xfe": FileKind("text in UTF-16", "Save it as UTF-8."),
    b"\xfe\xff": FileKind("text in UTF-16", "Save it as UTF-8."),
    b"\x7fELF": FileKind("a program"),
    b"SIMPLE  =": FileKind("a FITS file", _PICTURE),
}
_OTHER = FileKind("a binary file of no kind that this program knows")


def kind_of_bytes(first: bytes) -> FileKind | None:
    """Return the kind of a file that begins like this; None for text of any other kind.

    MRC files have no signature: whoever reads headers tells them from other binary files.
    """
    for signature, kind in _SIGNATURES.items():
        if first.startswith(signature):
            return kind
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 1 << 32:
        return MODEL
    lines = first.removeprefix(b"\xef\xbb\xbf").splitlines()
    words = [line.split()[0] for line in lines if line.split() and not line.startswith(b"#")]
    if words and words[0].startswith(b"data_"):
        return STAR
    return _OTHER if b"\0" in first else None


def first_bytes(path: Path) -> bytes:
    """Return how a file begins; nothing of one that can't be read, or that is no regular file."""
    with suppress(OSError, ValueError), open_input(path) as file:
        return file.read(FIRST_BYTES)
    return b""
