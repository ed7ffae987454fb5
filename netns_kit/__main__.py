"""`python -m netns_kit` is `netns-kit`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
