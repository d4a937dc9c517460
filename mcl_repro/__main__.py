"`python -m mcl_repro` is the command `mcl_repro`, for a package that is not installed."
import sys

from mcl_repro.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
