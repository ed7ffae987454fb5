"""`python -m netns_kit` is `netns-kit`."""

import sys

from .cli import main

sys.exit(main())
