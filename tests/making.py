"""What tests make for themselves and read back: stacks, STAR files, projects, models, jobs."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from relion_cryofilter.files import SCORE_LABEL
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import Model
from relion_cryofilter.nn.networks import Network, build_network
from relion_cryofilter.particles.particles import ParticleSet, particles_of_stacks, read_particles
from relion_cryofilter.particles.stacks import read_header
from relion_cryofilter.relion import job

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
JOB = "External/job002/"
TRAIN_JOB = "External/job009/"
PATIENCE_S = 600
"""No program and no event takes this long, however busy the machine is."""

MODE_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def write_stack(
    path: Path,
    images: np.ndarray,
    *,
    mode: int = 2,
    order: str = "<",
    extended: int = 0,
    volume: bool = False,
    stamp: bool = True,
    pixel_size: float = 0.0,
) -> None:
    """Write (n, ny, nx) images as an MRC file, header byte by byte (MRC2014)."""
    n, ny, nx = images.shape
    header = bytearray(1024)
    struct.pack_into(order + "10i", header, 0, nx, ny, n, mode, 0, 0, 0, nx, ny, n if volume else 1)
    struct.pack_into(order + "3f", header, 40, nx * pixel_size, ny * pixel_size, pixel_size)
    struct.pack_into(order + "3i", header, 64, 1, 2, 3)
    struct.pack_into(order + "2i", header, 88, 1 if volume else 0, extended)
    if stamp:
        header[208:212] = b"MAP "
        header[212:214] = b"\x44\x44" if order == "<" else b"\x11\x11"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = images.astype(order + MODE_TYPES[mode]).tobytes()
    path.write_bytes(bytes(header) + b"\xee" * extended + body)


def blobs(n: int, box: int, seed: int = 0) -> np.ndarray:
    """Return (n, box, box) float32 images: noise and a blob of varying strength."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:box, :box] - (box - 1) / 2
    blob = np.exp(-(x**2 + y**2) / (0.1 * box**2))
    strength = np.linspace(0, 3, n)[:, None, None]
    return (rng.normal(size=(n, box, box)) + strength * blob).astype(np.float32)


def tiny_model(seed: int = 0, dim: int = 28, **options: object) -> Model:
    """Return an untrained small network whose scores lie on both sides of 0.5."""
    torch.manual_seed(seed)
    network = build_network("straight", f=4, dim=dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        small = FourierCrop(dim)(torch.from_numpy(blobs(64, 32)))
        network.head.bias -= network(small).median()
    return Model(network, FourierCrop(dim), threshold=0.5, **options)  # type: ignore[arg-type]


STAR_HEAD = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnImagePixelSize #3
_rlnImageSize #4
_rlnImageDimensionality #5
_rlnVoltage #6
_rlnSphericalAberration #7
_rlnAmplitudeContrast #8
_rlnMicrographOriginalPixelSize #9
{optics}

# version 30001

data_particles

loop_
_rlnCoordinateX #1
_rlnImageName #2
_rlnMicrographName #3
_rlnOpticsGroup #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
"""


def write_project(
    root: Path,
    *,
    boxes: Sequence[int] = (32,),
    n_micrographs: int = 4,
    per_micrograph: int = 12,
    mode: int = 2,
    seed: int = 0,
) -> Path:
    """Make a RELION project of stacks in optics groups of different boxes, rows interleaved."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_micrographs):
        group = number % len(boxes)
        stack = f"Extract/job001/Mics/mic{number}.mrcs"
        images = blobs(per_micrograph, boxes[group], seed + number)
        write_stack(root / stack, images, mode=mode)
        rows += [
            f"{rng.uniform(0, 4000):12.6f} {image + 1:06d}@{stack} Mics/mic{number}.mrc "
            f"{group + 1:12d} 15000.000000 15000.000000     0.000000 \n"
            for image in range(per_micrograph)
        ]
    optics = "\n".join(
        f"opticsGroup{i + 1} {i + 1} {3.0 * 32 / box:.6f} {box} 2 300 2.7 0.1 1.5"
        for i, box in enumerate(boxes)
    )
    text = STAR_HEAD.format(optics=optics) + "".join(rng.permutation(rows)) + " \n"
    star = root / "Extract/job001/particles.star"
    star.write_text(text)
    (root / "default_pipeline.star").write_text(
        "\n# version 30001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter 2\n \n"
    )
    return star


def command_line(folder: Path) -> dict[str, str]:
    """Return an environment whose `python` and `relion_cryofilter` are those of this checkout."""
    folder.mkdir(parents=True)
    for name, words in {"python": "", "relion_cryofilter": "-m relion_cryofilter "}.items():
        script = folder / name
        command = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" {words}"$@"'
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


CLASSES = [1, 2, 3, 3]
"""The class of each micrograph's particles in `select_job`."""


def make_select_job(project, *, relion="3.1", numbers=True):
    """Add a Class2D job and a Select job that kept class 3, as RELION 3.1 and 5 write them."""
    lines = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    rows = [line for line in lines if "@" in line]
    head = "".join(line for line in lines if "@" not in line).rstrip() + "\n"
    head += "_rlnClassNumber #8\n"
    number = {row: CLASSES[int(re.search(r"mic(\d)\.mrcs", row)[1])] for row in rows}
    scored = [f"{row.rstrip()} {number[row]:12d} \n" for row in reversed(rows)]
    job2, job3 = project / "Class2D/job002", project / "Select/job003"
    for folder in (job2, job3):
        folder.mkdir(parents=True)
    (job2 / "run_it012_data.star").write_text(head + "".join(scored) + "\n")
    kept = [row for row in scored if row.split()[-1] == "3"]
    (job3 / "particles.star").write_text(head + "".join(kept) + "\n")
    reference = "data_\n\nloop_\n_rlnReferenceImage #1\n"
    reference += "_rlnClassNumber #2\n" if numbers else ""
    name = "000003@Class2D/job002/run_it012_classes.mrcs"
    (job3 / "class_averages.star").write_text(f"{reference}{name}{' 3' if numbers else ''}\n")
    model = "run_it012_model.star" if relion == "3.1" else "run_it012_optimiser.star"
    (job2 / "run_it012_optimiser.star").write_text(
        "data_optimiser_general\n\n"
        "_rlnExperimentalDataStarFile Class2D/job002/run_it012_data.star\n"
    )
    (job3 / "job.star").write_text(
        "data_job\n\n_rlnJobType 7\n\ndata_joboptions_values\n\nloop_\n_rlnJobOptionVariable #1\n"
        f'_rlnJobOptionValue #2\nfn_data ""\nfn_model Class2D/job002/{model}\n'
    )
    return job3


def half_star(project, name, keep):
    """Write a STAR file of the rows that `keep` chooses, and return its path."""
    text = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    chosen = [line for line in text if "@" not in line or keep(line)]
    (project / name).write_text("".join(chosen))
    return project / name


def train_words(more=""):
    """Return the command line of a training on `make_select_job`'s labels."""
    return f"--mode train --o {TRAIN_JOB} --in_parts Select/job003/particles.star --j 1 {more}"


def score_project(more="", source="--in_parts Extract/job001/particles.star"):
    """Score the project of the working directory; the results go to `JOB`."""
    words = f"score --o {JOB} {source} --weights model.safetensors --j 2 {more}"
    assert job.main(words.split()) == 0


def project_with_model() -> None:
    """Make a project and a model in the working directory."""
    write_project(Path())
    tiny_model().save("model.safetensors")


def scored_project() -> None:
    """Make the same, and score it."""
    project_with_model()
    score_project()


def project_with_selection() -> None:
    """Make a project of 4 micrographs in the working directory, with a Select job."""
    write_project(Path(), n_micrographs=4, per_micrograph=24)
    make_select_job(Path())


def trained_project() -> None:
    """Make the same, and train on its choices for an epoch; `run.out` has what was said."""
    project_with_selection()
    said = io.StringIO()
    with redirect_stdout(said):
        assert job.main(train_words("--epochs 1").split()) == 0
    Path(TRAIN_JOB, "run.out").write_text(said.getvalue())


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Change the working directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def data_of(path=Path(JOB, "report.html")):
    """Return what the page's script reads."""
    text = path.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def rows_of(name, folder=JOB):
    """Return the number of particles in a file of a job; 0 if there is no such file."""
    path = Path(folder, name)
    return len(read_particles(path)) if path.exists() else 0


def scores_of(path):
    """Return the scores of a STAR file, row by row."""
    particles = read_particles(Path(path))
    texts = particles.table.columns([SCORE_LABEL])
    return np.array([float(text) for (text,) in texts])


APPENDED = re.compile(rb"(.*[ \t]) {4}\d\.\d{6} (#.*)?(\n?)|(.*\S) \d\.\d{6}(\n?)", re.S)


def without_score(text: bytes) -> bytes:
    """Take the appended label and values away again, knowing nothing of our code."""
    head, label, body = text.partition(f"_{SCORE_LABEL}".encode())
    _, newline, body = body.partition(b"\n")
    assert label
    assert newline
    lines, rows_begun = body.splitlines(keepends=True), False
    for number, line in enumerate(lines):
        if rows_begun and not line.strip():
            break
        if line.strip():
            rows_begun = True
            lines[number] = b"".join(part or b"" for part in APPENDED.fullmatch(line).groups())
    return head + b"".join(lines)


def write_keras(
    path: Path, network: Network, *, first: int = 0, whole_model: bool = False, colons: bool = True
) -> None:
    """Write a network as Keras would, its layers numbered from `first`, in jumbled order."""
    import h5py

    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    end = ":0" if colons else ""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole_model else file
        for index, layer in reversed(list(enumerate(convolutions, first))):
            name = f"conv2d_{index}" if index else "conv2d"
            kernel = layer.weight.detach().permute(2, 3, 1, 0)
            root[f"{name}/{name}/kernel{end}"] = kernel.numpy()
            root[f"{name}/{name}/bias{end}"] = layer.bias.detach().numpy()
        root[f"dense_1/dense_1/kernel{end}"] = network.head.weight.detach().t().numpy()
        root[f"dense_1/dense_1/bias{end}"] = network.head.bias.detach().numpy()
        root.create_group("flatten")
        if whole_model:
            size = network.dim
            layer = {
                "class_name": "InputLayer",
                "config": {"batch_input_shape": [None, size, size, 1]},
            }
            file.attrs["model_config"] = json.dumps({"config": {"layers": [layer]}})
            file["optimizer_weights/adam/conv2d/kernel/m:0"] = np.zeros(3)


class Fixed:
    """Small images that are just there."""

    where = "here"

    def __init__(self, images):
        self.images = images

    def get(self, rows):
        return self.images[torch.from_numpy(rows)]


def labelled_blobs(tmp_path, n=360, strength=1.5):
    """Make stacks of 12 images: every other has a blob; return particles, labels, images."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2 == 0
    images = rng.normal(size=(n, 32, 32)).astype(np.float32)
    y, x = np.mgrid[:32, :32] - 15.5
    images[labels] += strength * np.exp(-(x**2 + y**2) / 40).astype(np.float32)
    for number in range(n // 12):
        write_stack(tmp_path / f"{number:03d}.mrcs", images[number * 12 : number * 12 + 12])
    particles = particles_of_stacks([tmp_path / f"{k:03d}.mrcs" for k in range(n // 12)])
    return particles, labels, images


def particles_of(star: Path, sign: float = 1.0, seed: int = 0) -> dict[str, list]:
    """Return the fields of a .cs file that names the same images as a STAR file, row by row."""
    particles = read_particles(star)
    n, group = len(particles), particles.optics[0]
    names = [f">{particles.stack_names[stack]}" for stack in particles.stack_of]
    mics = [particles.micrographs[number] for number in particles.micrograph_of]
    rng = np.random.default_rng(seed)
    return {
        "uid": rng.integers(1, 2**64, n, np.uint64),
        "blob/path": names,
        "blob/idx": particles.index.astype(np.uint32),
        "blob/shape": np.full((n, 2), read_header(particles.stacks[0]).ny, np.uint32),
        "blob/psize_A": np.full(n, group.pixel_size_angstrom, np.float32),
        "blob/sign": np.full(n, sign, np.float32),
        "ctf/df1_A": rng.normal(15000, 100, n).astype(np.float32),
        "alignments2D/shift": rng.normal(size=(n, 2)).astype(np.float32),
        "alignments2D/class": rng.integers(0, 4, n).astype(np.uint32),
        "location/micrograph_path": mics,
    }


def write_cs(path: Path, fields: dict, *, compressed: bool = False) -> Path:
    """Write fields as a .cs file."""
    from cryosparc.dataset import CSDAT_FORMAT, NUMPY_FORMAT, Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = CSDAT_FORMAT if compressed else NUMPY_FORMAT
    Dataset(dict(fields)).save(path, format=kind)
    return path


def part(fields: dict, *slots: str) -> dict:
    """Return the uid and the fields of some slots."""
    return {k: v for k, v in fields.items() if k == "uid" or k.partition("/")[0] in slots}


def invert_contrast(particles: ParticleSet) -> None:
    """Make protein dark in all stacks, as in micrographs."""
    for path in particles.stacks:
        with mrcfile.open(path, "r+") as stack:
            stack.data[:] = -stack.data


CSG_GROUP = """created: 2024-02-13 17:39:07.660886
group:
  description: All particles that were processed
  name: particles
  title: All particles
  type: particle
results:
  alignments2D:
    metafile: '>particles_selected.cs'
    num_items: {n}
    type: particle.alignments2D
  blob:
    metafile: '>particles_selected.cs'
    num_items: {n}
    type: particle.blob
  location:
    metafile: '>P3_J12_passthrough_particles_selected.cs'
    num_items: {n}
    type: particle.location
version: v4.4.1
"""


def made_set(n=600, n_groups=12, seed=0, spread=0.8):
    """Labels, scores and micrographs; each micrograph shifts the logits and the share of good."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(n_groups, size=n)
    shift, share = spread * rng.normal(size=n_groups), rng.beta(2, 2, size=n_groups)
    labels = rng.random(n) < share[groups]
    logits = np.where(labels, 0.8, -0.8) + rng.normal(size=n) + shift[groups]
    return labels, 1 / (1 + np.exp(-logits)), groups


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Other work may run beside the tests."""

fractions = st.one_of(
    st.integers(1, 100).map(lambda percent: percent / 100),
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
)
raw_scores = st.floats(0, 1)
near_scores = st.integers(0, 40).map(
    lambda k: 0.5 + k * 3e-7
)  # many fall on one six-decimal number
tied_scores = st.sampled_from([0.0, 0.25, 0.3, 0.7, 1.0])
any_score = st.one_of(raw_scores, near_scores, tied_scores)


@st.composite
def scored_sets(draw):
    """Labels with both classes, and scores: spread, nearly tied and tied."""
    pairs = draw(st.lists(st.tuples(st.booleans(), any_score), min_size=2, max_size=60))
    labels, scores = (np.array(column) for column in zip(*pairs))
    assume(0 < labels.sum() < len(labels))
    kind = draw(st.sampled_from(["float64", "six decimals", "float32"]))
    if kind == "six decimals":
        scores = np.round(scores, 6)
    return labels, scores.astype(np.float32) if kind == "float32" else scores


def as_given_and_as_filed(scores):
    return scores, np.round(scores.astype(float), 6)


def has_six_decimals(threshold):
    return isinstance(threshold, float) and threshold == float(f"{threshold:.6f}")


@contextmanager
def started(words: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a program; when the block ends, it and all that it has started are gone."""
    with subprocess.Popen(words, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_to_end(words: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess:
    """Run a program to its end and return what it said; nothing that it has started stays."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with started(words, **options) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def wait_until(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait for something to happen, which it must before `process` ends."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert process is None or process.poll() is None, "the program ended first"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def end_processes_in(folder: Path) -> None:
    """Kill the processes whose working directory is in `folder` (where there is /proc)."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # others', or gone by now
            place = (process / "cwd").readlink()
            if place.is_relative_to(folder) and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
