"""Write docs/options.md from relion_cryofilter/options.py.

python docs/make_options.py
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from relion_cryofilter.kinds import KINDS
from relion_cryofilter.options import (
    JOB_MODES,
    MODES,
    RELION_ONLY,
    TEMPLATES,
    JobOptions,
    Options,
)

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

Made by `python docs/make_options.py` from `relion_cryofilter/options.py`; a test compares the two.

On the command line an option is `--name value`. In RELION's External tab it is a label (`name`,
with or without dashes) and a value; a mode is the label `mode`. {jobs}
run as RELION jobs, the others on the command line only. `relion_cryofilter job --mode MODE
[options] [--o job.star]` writes the file that fills in RELION's tab; that is all that `check` does,
whose job is RELION's own. `relion_cryofilter MODE --help` says the same as this page.

An option that is on or off takes nothing, `Yes`, `No`, `true`, `false`, `1` or `0`. Lists are
separated by spaces (paths) or commas (numbers). There are no abbreviations: an unknown option is an
error that names the nearest one.
"""
RELION_TEXT = """
## Given by RELION

RELION writes these on the command line of every External job that has them. They are accepted and
do nothing: {names}.
"""


def page() -> str:
    """Return the text of docs/options.md."""
    jobs = [f"`{name}`" for name in JOB_MODES]
    text = HEAD.format(jobs=f"{', '.join(jobs[:-1])} and {jobs[-1]}")
    everywhere = [item.name for item in fields(Options)]
    text += "\n" + "\n".join(["## All modes", "", *_table(fields(Options))]) + "\n"
    for mode, kind in {**MODES, **TEMPLATES}.items():
        own = [item for item in fields(kind) if item.name not in everywhere]
        first = [item.name for item in fields(JobOptions)]
        own.sort(key=lambda item: not (item.metadata.get("positional") or item.name in first))
        about = (kind.__doc__ or "").splitlines()[0]
        text += "\n" + "\n".join([f"## {mode}", "", about, "", *_table(own)]) + "\n"
    return text + RELION_TEXT.format(names=", ".join(f"`--{name}`" for name in RELION_ONLY))


def _table(items: Any) -> list[str]:
    rows = ["| option | value | default | meaning |", "|---|---|---|---|"]
    return rows + [_row(item) for item in items]


def _row(item: Field[Any]) -> str:
    name = item.name.upper() if item.metadata.get("positional") else f"--{item.name}"
    meaning = item.metadata["help"].replace("|", "\\|")
    return f"| `{name}` | {_value(item)} | {_default(item)} | {meaning} |"


def _value(item: Field[Any]) -> str:
    text = KINDS[item.metadata["kind"]].words
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if item.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in item.metadata["choices"])
    if low is not None and high is not None:
        return f"{text}, {low:g} to {high:g}" if high < 1e6 else f"{text}, {low:g} or more"
    return text if low is None else f"{text}, {low:g} or more"


def _default(item: Field[Any]) -> str:
    if item.default in (None, (), MISSING):
        return ""
    if isinstance(item.default, bool):
        return "Yes" if item.default else "No"
    return f"`{item.default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
