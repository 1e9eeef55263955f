#!/usr/bin/env python3
"""RELION External job: name this file as the executable in RELION's External tab.

It only puts its own folder on the path and hands over. The syntax is that of any Python, so
that even an interpreter too old for the package leaves a message and RELION_JOB_EXIT_FAILURE.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))


def fail(message):
    """Leave, where `--o` names a folder, the file that RELION waits for, and the message."""
    words = [word.lstrip("-") if word.startswith("--") else word for word in sys.argv[1:]]
    if "o" in words[:-1]:
        folder = words[words.index("o") + 1]
        if os.path.isdir(folder):
            for name in ("SUCCESS", "ABORTED"):
                if os.path.exists(os.path.join(folder, "RELION_JOB_EXIT_" + name)):
                    os.remove(os.path.join(folder, "RELION_JOB_EXIT_" + name))
            open(os.path.join(folder, "RELION_JOB_EXIT_FAILURE"), "w").close()
    sys.stderr.write("ERROR: " + message + "\n")
    sys.exit(1)


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        fail(
            "relion_cryofilter needs Python 3.10 or newer, but this is %s (%s). Name the right "
            "interpreter in the External tab: /path/to/env/bin/python %s"
            % (sys.version.split()[0], sys.executable, os.path.realpath(__file__))
        )
    sys.path.insert(0, HERE)
    try:
        from relion_cryofilter.relion.job import main
    except Exception as error:
        fail(
            "relion_cryofilter can't be loaded (%s: %s). external_job.py must stay in its folder "
            "beside relion_cryofilter/, or the package be installed in %s."
            % (type(error).__name__, error, sys.executable)
        )
    sys.exit(main())
