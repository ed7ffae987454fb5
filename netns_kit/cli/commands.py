"""The command line, `netns-kit COMMAND`.

Each command is imported when it is called, so that a fast one does not wait for the imports of the others.
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
    except OSError as error:  # printing has failed: commands report all other errors
        end_unread(error)
    end(status)


def _without_a_traceback(
    kind: type[BaseException], error: BaseException, traceback: "TracebackType | None"
) -> None:
    """Print no traceback for Ctrl-C before `begin` is done: Python then ends by SIGINT itself."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _run(words: list[str]) -> int:
    """Run a command; return its exit status."""
    if words[:1] == ["slirp4netns"]:
        from .slirp4netns import command

        command.main(words[1:], "netns-kit slirp4netns")
    if words[:1] == ["doctor"]:
        from . import doctor

        return doctor.main(words[1:])
    if words[:1] == ["attach"]:
        from . import attach

        return attach.main(words[1:])
    if words[:1] == ["up"]:
        from . import up

        return up.main(words[1:])
    if words[:1] in (["down"], ["ps"], ["logs"], ["restart"], ["join"]):
        from . import networks

        return networks.main(words[0], words[1:])
    if words[:1] == ["completion"]:
        from . import completion

        return completion.main(words[1:])
    from . import run

    return run.main(words)
