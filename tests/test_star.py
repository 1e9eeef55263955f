"""STAR text goes through verbatim, or is refused with file, line and cure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import without_score

from relion_cryofilter.errors import StarError
from relion_cryofilter.files import SCORE_LABEL
from relion_cryofilter.particles import star as star_layout
from relion_cryofilter.particles.particles import read_particles
from relion_cryofilter.particles.star import particle_loop, read_star, tokens

HEAD = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnVoltage #2\n"


def scored(path: Path, text: str | bytes, values: list[float] | None = None) -> bytes:
    """Write `text` to a file, score it, and return the result."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    loop = particle_loop(read_star(path))
    out = path.with_name("out.star")
    scores = np.array(values if values is not None else np.linspace(0, 1, loop.n_rows))
    loop.write({out: np.ones(loop.n_rows, bool)}, scores)
    return out.read_bytes()


def test_a_row_keeps_its_bytes_and_gets_one_token_in_relions_layout(tmp_path):
    row = " 3518.452407 000003@a.mrcs   2.500000e-07 0012 "
    head = HEAD + "_rlnA #3\n_rlnB #4\n"
    out = scored(tmp_path / "a.star", head + row + "\n", [0.25]).decode()
    assert out == head + "_rlnParticleFigureOfMerit #5\n" + row + "    0.250000 \n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "1@a.mrcs 300\n2@a.mrcs 300\n",
        HEAD + "1@a.mrcs 300\n2@a.mrcs 300",
        HEAD + "1@a.mrcs\t300\n\t2@a.mrcs\t300\t\n \n",
        HEAD.replace(" #1", "").replace(" #2", "") + "1@a.mrcs 300\n",
        HEAD.replace("data_particles", "data_") + "1@a.mrcs 300\n",
        HEAD.replace("data_particles", "data_images") + "1@a.mrcs 300\n",
        HEAD + "1@a.mrcs 300 # a comment\n2@a.mrcs 300# no comment\n",
        HEAD + "\"1@a b.mrcs\" 300\n2@d'Ar.mrcs '300'\n3@m#2.mrcs 300\n",
        HEAD + "_rlnV #3\n1@a.mrcs 300 [1,2,3]\n",
        HEAD + "_wrpFoo #3\n1@a.mrcs 300 x\n",
        HEAD + "\n1@a.mrcs 300\n",
        HEAD + "1@a.mrcs 300\n\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n\n",
        "# version 50001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup\n1\n\n" + HEAD + "1@a 1\n",
        b"data_particles\nloop_\n_rlnImageName\n1@\xff\xfe.mrcs\n",
        b"\xef\xbb\xbf" + HEAD.encode() + b"1@a 1\n",
        "data_particles\n\nloop_ # comment\n_rlnImageName\n1@a.mrcs\n",
    ],
)
def test_taking_the_score_away_gives_the_input_back(tmp_path, text):
    source = text if isinstance(text, bytes) else text.encode()
    assert without_score(scored(tmp_path / "a.star", source)) == source


def test_a_score_that_is_there_already_is_overwritten_in_place(tmp_path):
    head = f"data_particles\n\nloop_\n_rlnImageName #1\n_{SCORE_LABEL} #2\n_rlnVoltage #3\n"
    out = scored(tmp_path / "a.star", head + "1@a.mrcs     0.900000 300 \n2@b.mrcs 7 300\n", [0, 1])
    assert out.decode() == head + "1@a.mrcs     0.000000 300 \n2@b.mrcs 1.000000 300\n"


def test_a_comment_stays_after_the_new_value(tmp_path):
    out = scored(tmp_path / "a.star", HEAD + "1@a.mrcs 300 # hello\n", [0.5])
    assert out.endswith(b"1@a.mrcs 300     0.500000 # hello\n")


def test_subsets_share_the_head_and_split_the_rows(tmp_path):
    path = tmp_path / "a.star"
    path.write_text(HEAD + "".join(f"{i}@a.mrcs 300 \n" for i in range(1, 7)) + "\n")
    keep = np.array([True, False, True, True, False, False])
    files = {tmp_path / "yes.star": keep, tmp_path / "no.star": ~keep}
    particle_loop(read_star(path)).write(files, np.linspace(0, 1, 6))
    names = []
    for file in files:
        part = particle_loop(read_star(file))
        names.append([name for (name,) in part.columns(["rlnImageName"])])
    assert names == [["1@a.mrcs", "3@a.mrcs", "4@a.mrcs"], ["2@a.mrcs", "5@a.mrcs", "6@a.mrcs"]]


def test_without_scores_the_rows_are_copied_and_may_all_be_left_out(tmp_path):
    text = HEAD + "1@a.mrcs 300 # x\n2@'a b'.mrcs\t7\n\ndata_x\n_y 1\n"
    (tmp_path / "a.star").write_text(text)
    loop = particle_loop(read_star(tmp_path / "a.star"))
    out, first = tmp_path / "out.star", tmp_path / "first.star"
    loop.write({out: np.ones(2, bool), first: np.array([True, False])})
    assert out.read_text() == text
    assert first.read_text() == text.replace("2@'a b'.mrcs\t7\n", "")
    for _ in range(2):
        loop.remove(out)
    assert not out.exists()


@pytest.mark.parametrize("odd", ["", "3@a.mrcs 'x y' 0.5 2\n"])
def test_columns_are_read_as_numbers_and_what_is_none_is_nan(tmp_path, odd):
    rows = "1@a.mrcs 12.5 0.25 1\n2@a.mrcs nan 1.0 2.000000\n3@a.mrcs x 0 3\n" + odd
    labels = f"_rlnDefocusU #2\n_{SCORE_LABEL} #3\n_rlnClassNumber #4\n"
    head = "data_\n\nloop_\n_rlnImageName #1\n" + labels
    (tmp_path / "a.star").write_text(head + rows)
    loop = particle_loop(read_star(tmp_path / "a.star"))
    found = loop.numbers(["rlnDefocusV", "rlnDefocusU"])
    assert list(found) == ["rlnDefocusU"]
    assert found["rlnDefocusU"].dtype == np.float32
    expected = [12.5, np.nan, np.nan, np.nan][: loop.n_rows]
    assert np.array_equal(found["rlnDefocusU"], np.array(expected, np.float32), equal_nan=True)
    assert loop.scores().tolist() == [0.25, 1.0, 0.0, 0.5][: loop.n_rows]
    assert loop.classes().tolist() == [1, 2, 3, 2][: loop.n_rows]
    assert loop.classes().dtype == np.int64
    assert (loop.suffix, loop.numbers([])) == (".star", {})


@pytest.mark.parametrize("text", ["1.5", "-0.1", "nan", "inf", "x"])
def test_a_score_or_class_that_is_none_is_named_with_its_row_and_line(tmp_path, text):
    head = f"data_\n\nloop_\n_rlnImageName #1\n_{SCORE_LABEL} #2\n_rlnClassNumber #3\n"
    (tmp_path / "a.star").write_text(head + f"1@a.mrcs 0.5 1\n2@a.mrcs {text} {text}\n")
    loop = particle_loop(read_star(tmp_path / "a.star"))
    where = r"a\.star, row 2 \(line 8\): "
    with pytest.raises(StarError, match=f"{where}{SCORE_LABEL} is '{text}'; expected a score from"):
        loop.scores()
    with pytest.raises(StarError, match=f"{where}rlnClassNumber is '{text}'; expected a number"):
        loop.classes()
    with pytest.raises(
        StarError, match=r"has no column mine\. Give the particles\.star of a score"
    ):
        loop.scores("mine")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path, out = tmp_path / "a.star", tmp_path / "out.star"
    path.write_text(HEAD + "1@a.mrcs 300\n")
    out.write_text("old")
    loop = particle_loop(read_star(path))
    with pytest.raises(TypeError):
        loop.write({out: np.ones(1)}, np.array(["x"]))
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.star", "out.star"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "1@a 1\n\n2@a 1\n", r"a.star, line 7: a blank or # line.*line 8.*RELION stops"),
        (HEAD + "1@a 1\n# hm\n2@a 1\n", r"a.star, line 7: a blank or # line inside"),
        (HEAD.replace("\n", "\r\n") + "1@a 1\r\n", r"line 1: found a carriage return.*dos2unix"),
        (HEAD + "1@a 1\r\n", r"line 6: found a carriage return"),
        (HEAD + "1@a 1\n# end\n", r"line 7: '#' stands right after a row of data_particles"),
        (HEAD + "1@a 1\ndata_x\n", r"line 7: 'data_x' stands right after a row.*empty line"),
        (
            "data_optics\nloop_\n_rlnOpticsGroup\n1\n" + HEAD + "1@a 1\n",
            r"line 5: 'data_particles' stands right after a row of data_optics",
        ),
        (HEAD + "1@a 'x\n", r"line 6: the quote of 'x is not closed"),
        (
            "data_general\n_rlnTomoSubTomosAre2DStacks\t1\n\n" + HEAD + "1@a 1\n",
            r"subtomograms",
        ),
        (HEAD.replace("Name #1", "Name#1") + "1@a 1\n", r"line 4: the label _rlnImageName#1 is gl"),
        (HEAD + "_rlnVoltage #3\n1@a 1 1\n", r"line 6: the label _rlnVoltage stands there twice"),
        (HEAD + "1@a 1 2\n", r"line 6: 3 values, but data_particles has 2 labels"),
        (HEAD + "1@a\n", r"line 6: 1 values"),
        (HEAD, r"data_particles has no rows"),
        (HEAD.replace("ImageName", "MicrographName") + "a 1\n", r"no particles found.*Expected"),
        ("data_particles\n_rlnImageName 1@a.mrcs\n", r"single value.*expected a loop_"),
        ("hello\n", r"text before the first data_ block"),
        ("", r"no data_ block"),
        (HEAD + "_rlnTomoParticleName #3\n1@a 1 x\n", r"subtomograms"),
        ("data_general\n_rlnTomoSubTomosAre2DStacks 1\n" + HEAD + "1@a 1\n", r"subtomograms"),
        ("data_\n_rlnTomoParticlesFile a.star\n", r"optimisation set"),
        (
            "data_optics\nloop_\n_rlnImageDimensionality\n3\n\n" + HEAD + "1@a 1\n",
            r"rlnImageDimensionality is 3",
        ),
        (HEAD.replace("particles", "a") + "1@a 1\n\n" + HEAD.replace("particles", "b") + "1@a 1\n",
         r"2 loops hold _rlnImageName \(data_a, data_b\); expected one"),
    ],
)  # fmt: skip
def test_what_relion_would_misread_is_refused_with_line_and_cure(tmp_path, text, message):
    path = tmp_path / "a.star"
    path.write_bytes(text.encode())
    with pytest.raises(StarError, match=f"(?s){message}"):
        list(particle_loop(read_star(path)).columns(["rlnImageName"]))


def test_a_missing_file_names_the_working_directory(tmp_path):
    with pytest.raises(StarError, match=r"nowhere\.star.*No such file.*relative to the working"):
        read_star(tmp_path / "nowhere.star")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"a 'b c' d\n", [b"a", b"'b c'", b"d"]),
        (b'"b "c d" e # x y\n', [b'"b "c d"', b"e"]),
        (b"d'Ar m#2 'open\n", [b"d'Ar", b"m#2", b"'open"]),
        (b"#all comment\n", []),
    ],
)
def test_quotes_and_comments_count_only_at_the_start_of_a_value(line, words):
    assert tokens(line) == words


VALUE = st.one_of(
    st.from_regex(r"[A-Za-z0-9_.@/#'\"\[\],+-]{1,12}", fullmatch=True).filter(
        lambda word: word[0] not in "#'\"_" and not word.startswith("data_") and word != "loop_"
    ),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(["'a b'", '"x # y"', "nan", "<NA>", "0012", "2.500000e-07", "[1,2]"]),
)
GAP = st.sampled_from([" ", "\t", "   ", " \t "])


@st.composite
def star_texts(draw):
    """Draw a STAR text with random labels, values, gaps, comments and neighbours."""
    width = draw(st.integers(1, 5))
    numbered = draw(st.booleans())
    labels = "".join(
        f"_{'rlnImageName' if i == 0 else f'x{i}'}{f' #{i + 1}' if numbered else ''}\n"
        for i in range(width)
    )
    rows = []
    for n in range(draw(st.integers(1, 30))):
        gap = draw(GAP)
        body = gap.join([f"{n + 1}@s.mrcs", *(draw(VALUE) for _ in range(width - 1))])
        rows.append(
            draw(st.sampled_from(["", " ", "\t"])) + body + draw(st.sampled_from(["", " "]))
        )
    if draw(st.booleans()):
        rows[-1] += " # comment"
    end = draw(st.sampled_from(["\n", "", "\n\n", "\n \n\n# version 30001\n\ndata_x\n_y 1\n"]))
    return "data_particles\n\nloop_\n" + labels + "\n".join(rows) + end


@settings(max_examples=150, deadline=None)
@given(text=star_texts())
def test_any_star_text_comes_back_when_the_score_is_taken_away(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("star") / "a.star"
    assert without_score(scored(path, text)) == text.encode()


@pytest.mark.slow
def test_two_hundred_thousand_random_rows_come_back(tmp_path):
    rng = np.random.default_rng(5)
    words = np.array(["0012", "2.500000e-07", "-0.0", "d'Ar.mrc", "m#2.mrc", "1e400", "x", "[1,2]"])
    gaps = np.array([" ", "  ", "\t", "     "])
    picks, spaces = rng.integers(0, 8, (200_000, 6)), rng.integers(0, 4, (200_000, 6))
    rows = [
        f"{n + 1:06d}@a.mrcs" + "".join(gaps[g] + words[w] for g, w in zip(gap, word)) + " \n"
        for n, (word, gap) in enumerate(zip(picks.tolist(), spaces.tolist()))
    ]
    labels = "".join(f"_rlnX{i} #{i + 2}\n" for i in range(6))
    text = "data_particles\n\nloop_\n_rlnImageName #1\n" + labels + "".join(rows) + "\n"
    assert without_score(scored(tmp_path / "big.star", text)) == text.encode()


ROWS = [f"{n + 1:06d}@stack_{n // 7}.mrcs {300 + n} \n" for n in range(200)]
ODD_ROWS = {
    "plain rows": {},
    "a quoted value": {77: "'000078@a b.mrcs' 5 \n"},
    "a comment": {120: "000121@c.mrcs 5 # bad ice\n"},
    "tabs": {3: "000004@c.mrcs\t5\n"},
}


@pytest.mark.parametrize("odd", ODD_ROWS, ids=str)
@pytest.mark.parametrize("last", ["", " \n", "\ndata_more\n\nloop_\n_rlnB #1\n1\n2\n"])
def test_a_file_is_the_same_read_in_small_pieces_and_at_once(tmp_path, monkeypatch, odd, last):
    lines = [ODD_ROWS[odd].get(number, row) for number, row in enumerate(ROWS)]
    text = HEAD + "".join(lines) + last
    found = []
    for size in (1 << 22, 64, 1):
        monkeypatch.setattr(star_layout, "CHUNK_BYTES", size)
        out = scored(tmp_path / "a.star", text)
        star = read_star(tmp_path / "a.star")
        loop = particle_loop(star)
        found.append((star, list(loop.columns(loop.labels)), out))
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert len(found[0][1]) == 200


def test_two_rows_whose_faults_make_up_for_each_other_are_refused(tmp_path):
    (tmp_path / "a.star").write_text(HEAD + "1@a.mrcs 300\n2@a.mrcs\n3@a.mrcs 300 300\n\n")
    loop = particle_loop(read_star(tmp_path / "a.star"))
    with pytest.raises(StarError, match=r"line 7: 1 values, but data_particles has 2 labels"):
        list(loop.columns(["rlnVoltage"]))


@pytest.mark.parametrize("number", ["0", "-1", "1.0", "", "²", "9999999999"])
def test_a_wrong_image_number_among_many_is_named_with_its_line(tmp_path, number):
    (tmp_path / "a.star").write_text(HEAD + "".join(ROWS[:50]) + f"{number}@a.mrcs 1\n")
    with pytest.raises(StarError, match=r"a\.star, row 51 \(line 56\): the image name is"):
        read_particles(tmp_path / "a.star")
