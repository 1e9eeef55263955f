"""RELION's versions, and the output nodes that make results show up in its Browse windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relion_cryofilter.files import remove, write_text
from relion_cryofilter.inputs import read_small

NODES_FILE = "RELION_OUTPUT_NODES.star"
VERSIONS = ("3.1", "4.0", "5.0")

# Node types of RELION's src/pipeliner.h (3.1) and src/pipeline_jobs.h (4.0, 5.0).
_INTEGER = {"particles": 3, "log": 13}
_LABEL = {
    "3.1": {"particles": "ParticleGroupMetadata.star.relion", "log": "LogFile.pdf.relion"},
    "4.0": {"particles": "ParticlesData.star.relion", "log": "LogFile.pdf.relion"},
    "5.0": {"particles": "ParticleGroupMetadata.star.relion", "log": "LogFile.pdf.relion"},
}


@dataclass(frozen=True)
class Node:
    """A result that RELION shall offer to the next job.

    Attributes
    ----------
    name
        Project-relative path, the job's ``--o`` and the file name.
    kind
        ``particles`` or ``log``.
    """

    name: str
    kind: str


def relion_version(*written: Path) -> str:
    """Tell which RELION wrote the first of these files that is there; 5.0 where none is.

    A job.star or a pipeline.
    """
    for path in written:
        try:
            text = read_small(path)
        except OSError:
            continue
        if "TypeLabel" not in text:
            return "3.1"
        return "4.0" if "# version 30001" in text else "5.0"
    return "5.0"


def write_output_nodes(job_folder: Path, nodes: Sequence[Node]) -> None:
    """Write RELION_OUTPUT_NODES.star into the job folder, or remove an old one if no nodes.

    The integer column serves RELION 3.1, the label column 4.0 and 5.0; each ignores the other's.
    """
    path = job_folder / NODES_FILE
    if not nodes:
        remove(path)
        return
    labels = _LABEL[relion_version(job_folder / "job.star")]
    lines = ["data_output_nodes", "", "loop_", "_rlnPipeLineNodeName #1",
             "_rlnPipeLineNodeType #2", "_rlnPipeLineNodeTypeLabel #3"]  # fmt: skip
    lines += [f"{node.name} {_INTEGER[node.kind]} {labels[node.kind]}" for node in nodes]
    write_text(path, "\n".join([*lines, "", ""]))
