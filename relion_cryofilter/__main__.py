"""``python -m relion_cryofilter``: the same as the command."""

import sys

from relion_cryofilter.relion.job import main

if __name__ == "__main__":
    sys.exit(main())
