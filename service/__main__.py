"""python -m service: the same as `ngd serve`."""

import sys

from service.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
