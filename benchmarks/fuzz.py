"""Damaged and hostile files, by the thousand: none may do more than be refused.

    python benchmarks/fuzz.py [--seconds 600] [--seed 0] [--kinds star mrc cs …] [--keep finds/]

Makes a small project, changes one file of it at random (bytes, numbers, what JSON headers hold),
and runs a job on it, again and again, each in a process of its own. A find is a traceback, a
crash, more than 5 s of processor time or 60 s of time, more than 1 GB of memory, results that
don't have as many rows as the input, scores that differ where they can't, or a job without exactly
one exit file. The changed files of finds are kept; the same seed changes the same files again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import mrcfile
import numpy as np
import torch
from cryosparc.dataset import CSDAT_FORMAT, Dataset

from relion_cryofilter.commands import convert, score, select  # noqa: F401 - once for all jobs
from relion_cryofilter.images.preprocess import FourierCrop
from relion_cryofilter.nn.model import Model
from relion_cryofilter.nn.networks import build_network
from relion_cryofilter.relion import job

N_STACKS, PER_STACK, BOX = 3, 6, 24
MOST_CPU_S, MOST_S, MOST_BYTES = 5, 60, 1e9
OUT = "External/job009/"
SCORE = ["score", "--o", OUT, "--j", "1", "--any_contrast", "--quiet"]

NUMBERS = [0, 1, -1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 10**9, 2**63, 10**30]
TEXTS = [
    b"nan", b"inf", b"-1", b"1e400", b"1_0", b"0x10", b"\0", b'"', b"'", b"#", b"\r\n", b"\n\n",
    b"loop_\n", b"data_x\n", b"@", b"0@x.mrcs", b"\xff\xfe", b"[" * 3000, b'"a ' * 3000,
    b"9" * 5000, b"\t", b"x" * 20_000, "²".encode(), b"../../../../dev/zero", b"_rlnImageName",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, [], {}, "", "x" * 300, -1, 0, 1.5, 10**9, 10**30, 1e308, float("nan"),
    float("inf"), [[[]]], [1, 2, 3], ["a"], {"a": 1}, "straight", "|O", "<f4", "d4",
]  # fmt: skip


def make_project() -> None:
    """Write what is changed later into the working directory, and score it once."""
    rng, n = np.random.default_rng(0), N_STACKS * PER_STACK
    rows, names = [], []
    for number in range(N_STACKS):
        with mrcfile.new(f"{number}.mrcs") as file:
            file.set_data(rng.normal(size=(PER_STACK, BOX, BOX)).astype(np.float32))
            file.set_image_stack()
        names += [f"{number}.mrcs"] * PER_STACK
        rows += [f"{k + 1:06d}@{number}.mrcs mic{number}.mrc 1 12.5 \n" for k in range(PER_STACK)]
    Path("particles.star").write_text(
        "# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n"
        f"_rlnImageSize #3\n1 3.0 {BOX}\n\ndata_particles\n\nloop_\n_rlnImageName #1\n"
        "_rlnMicrographName #2\n_rlnOpticsGroup #3\n_rlnDefocusU #4\n" + "".join(rows) + "\n"
    )
    fields = {
        "uid": rng.integers(1, 2**63, n, np.uint64),
        "blob/path": [f">{name}" for name in names],
        "blob/idx": np.tile(np.arange(PER_STACK, dtype=np.uint32), N_STACKS),
        "blob/psize_A": np.full(n, 3, np.float32),
        "blob/sign": np.full(n, 1, np.float32),
        "alignments2D/class": rng.integers(0, 4, n).astype(np.uint32),
        "alignments2D/shift": rng.normal(size=(n, 2)).astype(np.float32),
    }
    dataset = Dataset(fields)
    dataset.save("plain.cs")
    dataset.save("packed.cs", format=CSDAT_FORMAT)
    Path("group.csg").write_text(
        "created: 2024-02-13 17:39:07.660886\ngroup:\n  name: particles\n  type: particle\n"
        "results:\n"
        + "".join(
            f"  {slot}:\n    metafile: '>plain.cs'\n    num_items: {n}\n    type: particle.{slot}\n"
            for slot in ("blob", "alignments2D")
        )
        + "version: v4.4.0\n"
    )
    network = build_network("straight", f=4, dim=24)
    curve = {"positives": [0.4, 0.9], "negatives": [0.1, 0.6], "n_positive": 2, "n_negative": 2,
             "n_groups": 2}  # fmt: skip
    about = {"pixel_sizes_angstrom": [3.0], "boxes_px": [BOX], "seen": ["mic0"],
             "operating_curve": curve,
             "threshold_estimate": {"recall": [0.9, 0.8, 1.0]}}  # fmt: skip
    Model(network, FourierCrop(24), 0.5, provenance=about).save("model.safetensors")
    with h5py.File("weights.h5", "w") as file:
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        for number, layer in enumerate(layers, 1):
            place = f"model_weights/conv2d_{number}/conv2d_{number}"
            file[f"{place}/kernel:0"] = layer.weight.detach().permute(2, 3, 1, 0).numpy()
            file[f"{place}/bias:0"] = layer.bias.detach().numpy()
        file["model_weights/dense/dense/kernel:0"] = network.head.weight.detach().t().numpy()
        file["model_weights/dense/dense/bias:0"] = network.head.bias.detach().numpy()
        shape = {"config": {"batch_input_shape": [None, 24, 24, 1]}}
        file.attrs["model_config"] = json.dumps({"config": {"layers": [shape]}})
    words = [*SCORE, "--in_parts", "particles.star", "--weights", "model.safetensors"]
    if job.main(words):
        raise SystemExit("the project can't be scored")
    shutil.move(OUT, "clean")


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return data with some of its bytes changed, moved, cut off or put in."""
    for _ in range(rng.choice([1, 1, 2, 3, 10])):
        # Most often near the beginning, where headers are.
        end = len(data) if rng.random() < 0.5 else min(len(data), 400)
        place = rng.randrange(end + 1)
        length = rng.choice([1, 2, 4, 8, 64, 1000])
        kind = rng.randrange(8)
        if kind <= 1:
            data = data[:place] + rng.randbytes(length) + data[place + length :]
        elif kind == 2:
            data = data[:place] + data[place + length :]
        elif kind == 3:
            data = data[:place]
        elif kind == 4:
            data = data[:place] + data[place : place + length] * rng.choice([2, 50]) + data[place:]
        elif kind == 5:
            data = data[:place] + rng.choice(TEXTS) + data[place + rng.choice([0, length]) :]
        elif kind == 6:  # a word of the text
            words = data[place : place + 2000].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(TEXTS)
            data = data[:place] + b" ".join(words) + data[place + 2000 :]
        else:
            width, code = rng.choice([(2, "H"), (4, "I"), (8, "Q")])
            place = place // width * width
            number = struct.pack("<" + code, rng.choice(NUMBERS) % 2 ** (8 * width))
            data = data[:place] + number + data[place + width :]
    return data


def change_json(value: Any, rng: random.Random) -> Any:
    """Return what JSON holds with one part of it changed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        changed[key] = change_json(value[key], rng)
        return changed
    return rng.choice(VALUES)


def change_header(data: bytes, rng: random.Random, start: int, width: int) -> bytes:
    """Return data with its JSON header changed, whose length is `width` bytes from `start`."""
    begin = start + width
    end = begin + int.from_bytes(data[start:begin], "little")
    header = json.loads(data[begin:end])
    own = header.get("__metadata__", {}).get("relion_cryofilter")
    if own and rng.random() < 0.8:
        header["__metadata__"]["relion_cryofilter"] = json.dumps(change_json(json.loads(own), rng))
    else:
        header = change_json(header, rng)
    text = json.dumps(header).encode()
    return data[:start] + len(text).to_bytes(width, "little") + text + data[end:]


def change_records(data: bytes, rng: random.Random) -> bytes:
    """Return a journal with one record changed and its checksum right."""
    start = data.index(b"\n") + 1
    length, _ = struct.unpack_from("<II", data, start)
    body = change_bytes(data[start + 8 : start + 8 + length], rng)
    head = struct.pack("<II", len(body), zlib.crc32(body))
    return data[:start] + head + body + data[start + 8 + length :]


class Kind(NamedTuple):
    """A kind of file: the one that is changed, how, and the words of the job that reads it."""

    file: str
    change: Callable[[bytes, random.Random], bytes]
    words: list[str]


def _reading(file: str, *more: str) -> list[str]:
    return [*SCORE, "--in_parts", file, "--weights", "model.safetensors", *more]


STAR = "particles.star"
CURVE = ["select", "--o", OUT, "--quiet", "--in_parts", "clean/particles.star", "--weights",
         "model.safetensors", "--threshold", "precision=0.6"]  # fmt: skip
KINDS = {
    "star": Kind(STAR, change_bytes, _reading(STAR, "--skip_bad")),
    "mrc": Kind("0.mrcs", change_bytes, _reading(STAR, "--skip_bad")),
    "cs": Kind("plain.cs", change_bytes, _reading("plain.cs", "--skip_bad")),
    "packed_cs": Kind("packed.cs", change_bytes, _reading("packed.cs", "--skip_bad")),
    "packed_cs_header": Kind(
        "packed.cs", lambda data, rng: change_header(data, rng, 6, 4), _reading("packed.cs")
    ),
    "csg": Kind("group.csg", change_bytes, _reading("group.csg", "--skip_bad")),
    "h5": Kind("weights.h5", change_bytes, [*_reading(STAR), "--weights", "weights.h5"]),
    "safetensors": Kind("model.safetensors", change_bytes, _reading(STAR)),
    "metadata": Kind(
        "model.safetensors", lambda data, rng: change_header(data, rng, 0, 8), _reading(STAR)
    ),
    "curve": Kind("model.safetensors", lambda data, rng: change_header(data, rng, 0, 8), CURVE),
    "journal": Kind(f"{OUT}score_cache.journal", change_bytes, _reading(STAR)),
    "records": Kind(f"{OUT}score_cache.journal", change_records, _reading(STAR)),
}


def run(words: list[str]) -> tuple[int, float, float, str]:
    """Run a job in a process of its own; return exit code, processor seconds, bytes and stderr."""
    child = os.fork()
    if not child:
        code = 99
        try:
            for number, name in ((1, "said.out"), (2, "said.err")):
                os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            score.write_report = lambda *_: ()  # the report is made of what was read
            code = job.main(words)
            sys.stderr.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + MOST_S
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    _, status, usage = found
    code = os.waitstatus_to_exitcode(status)
    said = Path("said.err").read_text(errors="replace")
    return code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said


def rows_of(name: str) -> int:
    """Return the number of rows of a STAR file or .cs file of a job, 0 without one."""
    path = Path(OUT, name)
    if path.with_suffix(".cs").exists():
        return len(Dataset.load(path.with_suffix(".cs")))
    return sum(b"@" in line for line in path.read_bytes().splitlines()) if path.exists() else 0


def judge(name: str, code: int, seconds: float, n_bytes: float, said: str) -> list[str]:
    """Return what is wrong with how a job ended."""
    wrong = []
    exits = sorted(path.name for path in Path(OUT).glob("RELION_JOB_EXIT_*"))
    if code < 0:
        wrong.append(f"ended by signal {-code}")
    if exits != [job.FAILURE if code else job.SUCCESS]:
        wrong.append(f"exit code {code}, exit files {exits}")
    if "Traceback" in said or "This is a bug" in said or (code and not said.startswith("ERROR: ")):
        wrong.append(f"said {said[-300:]!r}")
    if len(said) > 20_000:
        wrong.append(f"said {len(said):,} bytes")
    if seconds > MOST_CPU_S:
        wrong.append(f"{seconds:.1f} s")
    if n_bytes > MOST_BYTES:
        wrong.append(f"{n_bytes / 1e6:.0f} MB")
    if not code and name != "curve":
        n = len(Path(OUT, "scores.csv").read_text().splitlines())
        parts = [rows_of(f"particles{end}.star") for end in ("", "_accepted", "_rejected")]
        if name not in ("star", "cs") and n != N_STACKS * PER_STACK:
            wrong.append(f"{n} rows")
        if name not in ("star",) and not n == parts[0] == parts[1] + parts[2]:
            wrong.append(f"{n} scores, files of {parts} rows")
        scores = [Path(folder, "scores.csv").read_bytes() for folder in (OUT, "clean")]
        if name == "journal" and scores[0] != scores[1]:
            wrong.append("other scores than without the journal")
    if code and name in ("journal", "records"):
        wrong.append(f"failed for its journal: {said[-300:]!r}")
    return wrong


def fuzz(seconds: float, seed: int, kinds: list[str], keep: Path) -> int:
    """Run jobs on changed files for a while in the working directory; return how many finds."""
    originals = {name: Path(kind.file.replace(OUT, "clean/")).read_bytes()
                 for name, kind in KINDS.items()}  # fmt: skip
    runs, refused, finds = Counter[str](), Counter[str](), Counter[str]()
    slowest, largest = Counter[str](), Counter[str]()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        name = kinds[number % len(kinds)]
        file, change, words = KINDS[name]
        data = change(originals[name], random.Random(f"{seed} {number}"))
        shutil.rmtree(OUT, ignore_errors=True)
        Path(OUT).mkdir(parents=True)
        Path(file).write_bytes(data)
        code, cpu_seconds, n_bytes, said = run(words)
        runs[name] += 1
        refused[name] += code != 0
        slowest[name] = max(slowest[name], round(1000 * cpu_seconds))
        largest[name] = max(largest[name], round(n_bytes / 1e6))
        if wrong := judge(name, code, cpu_seconds, n_bytes, said):
            finds[name] += 1
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}_{seed}_{number}{Path(file).suffix}").write_bytes(data)
            print(f"FIND {name} {number}: {'; '.join(wrong)}", flush=True)
        Path(file).write_bytes(originals[name])
        number += 1
    print(f"{'kind':<17} {'runs':>6} {'refused':>8} {'slowest':>9} {'memory':>8} {'finds':>6}")
    for name in kinds:
        print(f"{name:<17} {runs[name]:6} {refused[name]:8} {slowest[name]:6} ms "
              f"{largest[name]:5} MB {finds[name]:6}")  # fmt: skip
    print(f"{sum(runs.values())} runs, {sum(finds.values())} finds, seed {seed}")
    return sum(finds.values())


def main() -> None:
    """Read the command line; exit with 1 if there were finds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz_finds"))
    given = parser.parse_args()
    keep = given.keep.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_project()
        found = fuzz(given.seconds, given.seed, given.kinds, keep)
        os.chdir("/")
    sys.exit(min(found, 1))


if __name__ == "__main__":
    main()
