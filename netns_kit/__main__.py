"""`python -m netns_kit` is `netns-kit`."""

from .commands import main

if __name__ == "__main__":
    main()
