"""python -m ngd_service: the same as `ngd serve`."""

import sys

from ngd_service.cli.commands import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
