"""The command line, `netns-kit COMMAND`: each command is imported when it is called, for not all can wait for what
the others need.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["slirp4netns"]:
        from . import slirp4netns

        slirp4netns.main(words[1:], "netns-kit slirp4netns")
    if words[:1] == ["doctor"]:
        from . import doctor_command

        return doctor_command.main(words[1:])
    if words[:1] == ["attach"]:
        from . import attach

        return attach.main(words[1:])
    from . import cli

    return cli.main(words)
