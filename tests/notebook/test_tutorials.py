"""The notebooks of docs/notebooks run from a clean kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import ROOT, needs, needs_tun, needs_userns

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_userns()
    needs_tun()
    needs("bash", *(["openssl"] if path.stem == "tls" else []))
    for name in "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "TMPDIR":
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources).execute()
    shown = [
        kind for cell in notebook.cells for each in cell.get("outputs", ()) for kind in each.get("data", ())
    ]
    assert "text/html" in shown, "something is shown as a table or a picture"


def test_there_are_notebooks_without_outputs_and_the_page_names_each() -> None:
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    assert {path.stem for path in NOTEBOOKS} >= {"explore", "tls", "break", "policy", "shop"}
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in page
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
