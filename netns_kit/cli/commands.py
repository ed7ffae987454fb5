"""The command line, `netns-kit COMMAND`: each command is imported when it is called, for not all can wait for what
the others need.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn


def main() -> "NoReturn":
    """Run the command line, and end this process."""
    sys.excepthook = _without_a_traceback
    from .program import begin, end, end_unread

    begin()
    try:
        status = _run(sys.argv[1:])
    except SystemExit as exit:  # argparse's
        status = exit.code if isinstance(exit.code, int) else 0
    except OSError as error:  # of printing: commands tell of all others
        end_unread(error)
    end(status)


def _without_a_traceback(
    kind: type[BaseException], error: BaseException, traceback: "TracebackType | None"
) -> None:
    """Ctrl-C before `begin` has come that far: Python then ends as SIGINT ends a process, by itself."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _run(words: list[str]) -> int:
    """The exit status."""
    if words[:1] == ["slirp4netns"]:
        from .slirp4netns import command

        command.main(words[1:], "netns-kit slirp4netns")
    if words[:1] == ["doctor"]:
        from . import doctor

        return doctor.main(words[1:])
    if words[:1] == ["attach"]:
        from . import attach

        return attach.main(words[1:])
    from . import run

    return run.main(words)
