"""Tutorial notebooks as pages of the site: each is executed when the site is built, and shown with what came out."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"
SECONDS = 100
"""Seconds that a cell may take."""
PLACE = re.compile(r"<p>netns-kit-output-(\d+)</p>")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Pages:
    """The pages, and what came out of cells, which is put into them when they are HTML: it is no Markdown."""

    def __init__(self) -> None:
        self.outputs: list[str] = []

    def made(self) -> dict[str, str]:
        """Return the pages by their names, after executing all notebooks."""
        return {f"notebooks/{path.stem}.md": self._page(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}

    def filled(self, page: str) -> str:
        """Return the HTML of a page, with what came out of its cells."""
        return PLACE.sub(lambda place: self.outputs[int(place[1])], page)

    def _page(self, path: Path) -> str:
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as directory:
            resources = {"metadata": {"path": directory}}
            NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
        return "\n\n".join(part for cell in notebook.cells for part in self._parts(cell))

    def _parts(self, cell: Any) -> Iterator[str]:
        if cell.cell_type == "markdown":
            yield cell.source
            return
        yield f"```python\n{cell.source}\n```"
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                shown = data["text/html"]
            elif "image/svg+xml" in data:
                shown = data["image/svg+xml"]
            else:
                text = output.get("text") or data.get("text/plain") or "\n".join(output.get("traceback", ()))
                shown = f"<pre><code>{html.escape(ESCAPE.sub('', text))}</code></pre>"
            self.outputs.append(f'<div class="netns-kit-output">{shown}</div>')
            yield f"netns-kit-output-{len(self.outputs) - 1}"
