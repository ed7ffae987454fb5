"""Run the Python blocks of a page as they stand.

`python docs/run_readme.py` runs the first block of README.md on asyncio; that is what `make run` does.
`--backend trio` runs it on trio, `--all` runs every block of the page in order and in one namespace, and
`--threads` does so while other threads are running.  A block opened with ```` ```python no-run ```` is
compiled only.
"""

from __future__ import annotations

import argparse
import re
import threading
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced Python block of a page."""

    code: CodeType
    run: bool


def blocks(page: Path) -> list[Block]:
    """The Python blocks of `page`, compiled so that tracebacks name its own lines.

    Raises SyntaxError when a block does not compile.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        language, *options = fence["info"].split() or [""]
        if language == "python":
            padding = "\n" * text.count("\n", 0, fence.start("body"))
            code = compile(padding + fence["body"], str(page), "exec", dont_inherit=True)
            found.append(Block(code, run="no-run" not in options))
    return found


def main() -> None:
    """Parse the command line and run the page."""
    parser = argparse.ArgumentParser(description="Run the Python blocks of a page as they stand.")
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--all", action="store_true", help="every block, not only the first")
    parser.add_argument("--threads", action="store_true", help="with other threads running meanwhile")
    args = parser.parse_args()

    found = blocks(args.page)
    if not found:
        parser.error(f"{args.page.name} has no Python block")
    import anyio

    anyio.run = partial(anyio.run, backend=args.backend)  # type: ignore[assignment]  # the page calls this one
    over = threading.Event()
    others = [threading.Thread(target=over.wait) for _ in range(4 if args.threads else 0)]
    for thread in others:
        thread.start()
    try:
        script = ModuleType("__main__")
        for block in found if args.all else found[:1]:
            if block.run:
                exec(block.code, script.__dict__)
    finally:
        over.set()
        for thread in others:
            thread.join()


if __name__ == "__main__":
    main()
