"""report.html in a real browser: the slider moves the line, the counts, the galleries, the command.

Needs Debian's chromium and chromium-driver; skipped, visibly, where they are missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import JOB, data_of, rows_of, score_project, scores_of

from relion_cryofilter.relion import job

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.xdist_group("browser")  # one for all
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--window-size=1280,1400",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        if os.environ.get("CHROMIUM_REQUIRED"):
            pytest.fail("Chromium is required here (apt-get install chromium chromium-driver)")
        pytest.skip("needs Chromium (Debian: apt-get install chromium chromium-driver)")
    options = Options()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium
    chromium.quit()


class Page:
    """What a reader sees of report.html, and does."""

    def __init__(self, browser, folder=JOB):
        self.browser = browser
        browser.get(Path(folder, "report.html").resolve().as_uri())

    def text(self, name):
        return self.browser.find_element(By.ID, name).text

    def number(self, name):
        return int(self.text(name).replace(",", ""))

    @property
    def threshold(self):
        return float(self.text("threshold"))

    def press(self, key, times=1):
        slider = self.browser.find_element(By.ID, "cut")
        for _ in range(times):
            slider.send_keys(key)

    def lines(self):
        found = self.browser.find_elements(By.CSS_SELECTOR, "line.cut")
        return [
            (float(line.get_attribute("data-score")), float(line.get_attribute("x1")))
            for line in found
        ]

    def gallery(self, name):
        cells = self.browser.find_elements(By.CSS_SELECTOR, f"#{name} > div")
        return [(float(cell.text), cell.get_attribute("title")) for cell in cells]

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(scored, browser):
    return Page(browser)


def test_the_page_opens_at_the_jobs_threshold_without_errors(page):
    assert page.threshold == 0.5
    assert page.number("accepted") == rows_of("particles_accepted.star")
    assert page.number("rejected") == rows_of("particles_rejected.star")
    assert page.errors() == []


@pytest.mark.slow
@pytest.mark.parametrize(("key", "times"), [(Keys.ARROW_RIGHT, 9), (Keys.ARROW_LEFT, 14)])
def test_the_slider_moves_line_counts_and_galleries(page, key, times):
    scores = scores_of(f"{JOB}particles.star")
    start = page.threshold, page.lines(), page.gallery("above")
    page.press(key, times)
    cut = page.threshold
    assert (cut > start[0]) == (key == Keys.ARROW_RIGHT)
    assert page.number("accepted") == (scores >= cut).sum()
    assert page.number("rejected") == (scores < cut).sum()
    assert float(page.text("share")) == pytest.approx(100 * np.mean(scores >= cut), abs=0.051)
    moved = page.lines()
    assert [score for score, _ in moved] == [cut, cut]
    assert all((x > was) == (cut > start[0]) for (_, x), (_, was) in zip(moved, start[1]))
    above, below = page.gallery("above"), page.gallery("below")
    assert above != start[2]
    assert [round(score, 4) for score in sorted(scores[scores >= cut])[:16]] == pytest.approx(
        [score for score, _ in above], abs=1e-4
    )
    assert [round(score, 4) for score in sorted(scores[scores < cut])[::-1][:16]] == pytest.approx(
        [score for score, _ in below], abs=1e-4
    )
    assert all("@Extract/job001/Mics/mic" in name for _, name in above + below)
    assert page.errors() == []


@pytest.mark.parametrize("key", [Keys.HOME, Keys.END])
def test_the_ends_of_the_slider_accept_all_and_next_to_none(page, key):
    page.press(key)
    scores = scores_of(f"{JOB}particles.star")
    assert page.number("accepted") == (48 if key == Keys.HOME else (scores >= 1).sum())
    assert page.number("accepted") + page.number("rejected") == 48
    page.browser.find_element(By.ID, "reset").click()
    assert page.threshold == 0.5


def test_the_command_on_the_page_makes_the_cut_that_the_page_shows(page):
    page.press(Keys.ARROW_LEFT, 7)
    words = shlex.split(page.text("command"))
    assert words[:2] == ["relion_cryofilter", "select"]
    assert job.main(words[1:]) == 0
    folder = words[words.index("--o") + 1]
    assert rows_of("particles_accepted.star", folder) == page.number("accepted")
    assert rows_of("particles_rejected.star", folder) == page.number("rejected")


def test_a_page_of_one_particle_opens(project, browser):
    star = Path("Extract/job001/particles.star")
    lines = star.read_text().splitlines(keepends=True)
    first = next(line for line in lines if "@" in line)
    star.write_text("".join(line for line in lines if "@" not in line or line == first))
    score_project()
    page = Page(browser)
    assert page.number("accepted") + page.number("rejected") == 1
    assert page.errors() == []


@pytest.mark.slow
def test_a_labelled_page_counts_good_and_bad(project, browser):
    lines = Path("Extract/job001/particles.star").read_text().splitlines(keepends=True)
    for name, good in (("good", True), ("bad", False)):
        kept = [x for x in lines if "@" not in x or (int(x.split("@")[0][-6:]) > 6) == good]
        Path(f"{name}.star").write_text("".join(kept))
    words = f"metrics --o {JOB} --pos good.star --neg bad.star --weights model.safetensors"
    assert job.main([*words.split(), "--any_contrast"]) == 0
    page, data = Page(browser), data_of()
    page.press(Keys.ARROW_RIGHT, 5)
    place = data["start"] + 5
    assert page.number("good") == data["good"][place]
    assert page.number("good") + page.number("bad") == page.number("accepted")
    assert page.text("recall") == f"{data['good'][place] / 24:.3f}"
    assert not page.browser.find_element(By.ID, "make").is_displayed()
    assert page.errors() == []
