"""Progress lines: what is done, how fast this run does it, and when it will end."""

import logging

import pytest

from relion_cryofilter import progress as module
from relion_cryofilter.progress import Progress, listening


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_what_earlier_runs_did_counts_as_done_but_not_for_the_rate(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(1000, "particles")
    progress.skip(300)
    progress.skip(100)
    clock[0] += 10
    progress.step(100)
    assert progress.done == 500
    assert progress.rate == 10
    assert caplog.messages == ["500 of 1,000 particles (50 %), 10/s, 50 s left"]


def test_no_time_is_foretold_before_anything_is_done(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(1000, "particles")
    clock[0] += 10
    progress.step(0)
    assert caplog.messages == []


def test_a_listener_hears_every_step(clock):
    heard = []
    with listening(lambda *what: heard.append(what)):
        progress = Progress(3, "particles")
        progress.skip(1)
        progress.step(2)
    assert heard == [("particles", 3, 3)]
