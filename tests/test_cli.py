"""One grammar: the command line, and argv as RELION really builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from making import ROOT

from relion_cryofilter import cli
from relion_cryofilter.errors import UsageError
from relion_cryofilter.kinds import gpu_numbers
from relion_cryofilter.options import MODES, ScoreOptions


def options(text: str) -> ScoreOptions:
    parsed = cli.parse(text.split()).options
    assert isinstance(parsed, ScoreOptions)
    return parsed


@pytest.mark.parametrize(
    "text",
    [
        "score --o J/ --in_parts a.star --threshold 0.4 --tta --j 2",
        "--mode score --o J/ --in_parts a.star --threshold 0.4 --tta Yes --j 2",
        "--o J/ --in_parts a.star --threshold 0.4 --tta true --j 2",
        "--o J/ --in_parts a.star ----threshold 0.4 ----tta 1 --j 2 --pipeline_control J/",
        "score --mode score --o=J/ --in_parts=a.star --threshold=0.4 --tta --j 2",
        "--o J/ --in_mics m.star --in_parts a.star --weights --threshold 0.4 --tta --gpu_ 0 --j 2",
    ],
)
def test_the_same_job_in_every_spelling(text):
    if "--gpu_" in text:
        with pytest.raises(UsageError, match=r"no option --gpu_ in score. Did you mean --gpu\?"):
            options(text)
        text = text.replace("--gpu_ 0", "")
    assert options(text) == ScoreOptions(o="J/", in_parts="a.star", threshold=0.4, tta=True, j=2)


def test_an_empty_box_is_as_if_it_was_not_there():
    assert options("--o J/ --threshold --weights --batch_size --score_label --j 1") == ScoreOptions(
        o=Path("J"), j=1
    )


def test_two_files_are_not_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["score", "--in_parts", "a.star", "b.star", "--o", "out/"]
    assert cli.parse(words).options.in_parts == Path("a.star b.star")
    for name in ("a.star", "b.star"):
        Path(name).touch()
    with pytest.raises(UsageError, match=r"in_parts takes one path; found 2: a.star b.star"):
        cli.parse(words)


def test_several_words_are_one_path_or_several_stacks():
    assert options("--o J/ --in_parts my own.star").in_parts == Path("my own.star")
    assert options("--o J/ --mrc a.mrcs b.mrcs").mrc == (Path("a.mrcs"), Path("b.mrcs"))


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("0", [0]), ("0,1", [0, 1]), ("0:1", [0, 1]), ("0 1", [0, 1]), (",", None), ("all", None),
        ("cpu", []), ('""', None), ("cuda:1", [1]), ("1,0", [0, 1]), ("-1", []), ("No", []),
    ],
)  # fmt: skip
def test_gpus_in_every_spelling(words, numbers):
    assert gpu_numbers(options(f"--o J/ --gpu {words} --j 1").gpu) == numbers


def test_a_bare_gpu_means_all_of_them():
    assert gpu_numbers(options("--o J/ --gpu --j 1").gpu) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--thresold 0.5", r"no option --thresold in score. Did you mean --threshold\?"),
        ("--thresh 0.5", r"no option --thresh in score. Did you mean --threshold\?"),
        ("--threshold high", r"The threshold 'high' is not understood"),
        ("--threshold 1.5", r"The threshold '1.5' is not understood: score must be from 0 to 1"),
        ("--threshold nan", r"The threshold 'nan' is not understood"),
        ("--threshold recall=2", r"recall must be above 0 and at most 1"),
        ("--j two", r"--j is 'two'; expected a whole number"),
        ("--j 0", r"--j is 0; expected at least 1"),
        ("--tta maybe", r"--tta is 'maybe'; expected nothing, Yes or No"),
        ("--gpu zero", r"--gpu is 'zero'; expected GPU numbers"),
        ("scoer --o J/", r"no mode 'scoer'. Did you mean score\?"),
        ("--mode scoer --o J/", r"no mode 'scoer'"),
        ("score stray --o J/", r"Found 'stray' where an option"),
        ("convert --tta", r"--tta is an option of score and metrics, not of convert"),
        ("score --epochs 5", r"--epochs is an option of train, not of score"),
    ],
)
def test_usage_errors_name_what_was_meant(text, message):
    with pytest.raises(UsageError, match=message):
        cli.parse(text.split())


@pytest.mark.parametrize("mode", MODES)
def test_help_lists_every_option_of_a_mode(mode, capsys):
    with pytest.raises(SystemExit):
        cli.parse([mode, "--help"])
    text = capsys.readouterr().out
    for name in MODES[mode].__dataclass_fields__:
        assert name.upper() in text or f"--{name} " in text


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["--mode", "nonsense"]])
def test_help_and_usage_errors_do_not_wait_for_torch(words):
    code = (
        "import sys; sys.argv[1:] = %r\n"
        "from relion_cryofilter.relion.job import main\n"
        "main()\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported something heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code % words], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_options_are_checked_and_read_when_python_makes_them():
    with pytest.raises(UsageError, match=r"score must be from 0 to 1"):
        ScoreOptions(threshold=2)
    with pytest.raises(UsageError, match=r"--j is 'two'"):
        ScoreOptions(j="two")
    options = ScoreOptions(in_parts="a.star", mrc="b.mrcs", gpu=[0, 1], j="2", threshold="keep=0.5")
    assert options.mrc == (Path("b.mrcs"),)
    assert options.j == 2
    assert gpu_numbers(options.gpu) == [0, 1]
    assert str(options.threshold) == "keep=0.5"
    assert gpu_numbers(ScoreOptions(gpu=0).gpu) == [0]
    assert gpu_numbers(ScoreOptions(gpu="").gpu) is None
    assert gpu_numbers(ScoreOptions().gpu) == []


def test_stacks_and_labels_may_be_named_in_several_places():
    assert options("--mrc a.mrcs --mrc b.mrcs").mrc == (Path("a.mrcs"), Path("b.mrcs"))
    parsed = cli.parse(["train", "--pos_classes", "1,4", "7", "--neg_classes", "2"]).options
    assert (parsed.pos_classes, parsed.neg_classes) == ((1, 4, 7), (2,))
