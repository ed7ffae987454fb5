"""`python -m netns_kit` is `netns-kit`."""

from .cli.commands import main

if __name__ == "__main__":
    main()
