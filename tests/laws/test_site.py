"""The site of `make docs`: nothing is missing on it, nothing leaves for another machine, and a browser shows it."""

from __future__ import annotations

import concurrent.futures
import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import netns_kit
from docs.site_pages import TITLES, reference
from tests.support import ROOT, missing, needs

CHROMIUM = """
    chromium --headless --disable-gpu --no-first-run --disable-background-networking --disable-component-update
    --disable-sync
""".split()
PAGES = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_every_public_name_is_in_the_reference() -> None:
    shown = [name for names in reference().values() for name in names]
    assert sorted(shown) == sorted(vars(netns_kit)["__all__"])
    assert set(reference()) == set(TITLES)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert set(re.findall(r"[\w/]+\.md", nav)) >= PAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with all its checks: of links, anchors, and what the reference names."""
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        missing("not installed: mkdocs")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


class Loaded(HTMLParser):
    """What a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") != "canonical":
            self.addresses.append(given.get("href") or "")
        elif tag in {"script", "img", "iframe", "source"}:
            self.addresses.append(given.get("src") or "")


def test_the_pages_of_man_are_beside_it(site: Path) -> None:
    assert (site / "man" / "netns-kit-run.1").read_text().startswith('.TH "NETNS-KIT-RUN" "1"')


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert len(loaded.addresses) > 3
        assert not [each for each in loaded.addresses if "//" in each], page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


LOOK = """
<iframe id="frame" src="/%s" width="1200" height="900"></iframe><img src="/wait">
<script>
const frame = document.getElementById("frame"), look = () => {
    const page = frame.contentDocument, find = (%s);
    let found = null;
    try { if (page && page.body) found = find(page, frame.contentWindow); } catch (error) { found = String(error); }
    found === null ? setTimeout(look, 100) : fetch("/found", {method: "POST", body: JSON.stringify(found)});
};
look();
</script>
"""


class Seen(http.server.SimpleHTTPRequestHandler):
    """The site, a page that looks at one of its pages, and what that page has found.

    The browser waits for an image, which comes when the page has found something.
    """

    def __init__(self, *args: Any, look: str, found: Future[str], **options: Any) -> None:
        self.look, self.found = look, found
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if self.path == "/look":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(self.look.encode())
        elif self.path == "/wait":
            concurrent.futures.wait([self.found], 60)
            self.send_error(404)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.found.set_result(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def seen(site: Path, home: Path, page: str, find: str) -> object:
    """Return what a function of JavaScript, of a document and its window, finds on a page: the first but null."""
    needs("chromium")
    found: Future[str] = Future()
    handler = functools.partial(Seen, directory=str(site), look=LOOK % (page, find), found=found)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            command = [*CHROMIUM, f"--user-data-dir={home}", "--dump-dom"]
            done = subprocess.run(
                [*command, f"http://127.0.0.1:{server.server_port}/look"],
                env={**os.environ, "HOME": str(home)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert found.done(), done.stderr
            return json.loads(found.result())
        finally:
            found.cancel()
            server.shutdown()
            thread.join()


def test_the_search_finds_an_error(site: Path, tmp_path: Path) -> None:
    find = """page => {
        const links = [...page.querySelectorAll("a.md-search-result__link")].map(link => link.href);
        return links.length ? links : null;
    }"""
    found = seen(site, tmp_path, "index.html?q=PrivilegedPortError", find)
    assert isinstance(found, list)
    assert any("reference/errors.html" in each for each in found), found


def test_text_and_code_can_be_read_by_day_and_by_night(site: Path, tmp_path: Path) -> None:
    """The contrast of each (WCAG 2.1, 1.4.3: 4.5), in both palettes."""
    find = """(page, window) => {
        if (page.readyState !== "complete" || !page.querySelector(".md-content td")) return null;
        const luminance = color => {
            const parts = color.match(/[\\d.]+/g).map(Number), alpha = parts[3] ?? 1;
            if (alpha === 0) return null;
            const linear = parts.slice(0, 3).map(
                part => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const background = element => {
            for (; element; element = element.parentElement) {
                const found = luminance(window.getComputedStyle(element).backgroundColor);
                if (found !== null) return found;
            }
            return 1;
        };
        const contrast = selector => {
            const element = page.querySelector(selector);
            const color = luminance(window.getComputedStyle(element).color);
            const pair = [color, background(element)].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
        };
        const result = {};
        for (const scheme of ["default", "slate"]) {
            page.body.setAttribute("data-md-color-scheme", scheme);
            result[scheme] = ["p", "pre code", "h1", "td"].map(each => contrast(`.md-content ${each}`));
        }
        return result;
    }"""
    found = seen(site, tmp_path, "tutorial.html", find)
    assert isinstance(found, dict)
    assert set(found) == {"default", "slate"}
    assert all(contrast > 4.5 for contrasts in found.values() for contrast in contrasts), found


def test_a_table_of_a_notebook_is_sorted_by_a_click(site: Path, tmp_path: Path) -> None:
    """Both ways, by numbers as numbers, without a script of ours; the picture of the network is beside it."""
    find = """page => {
        const table = page.querySelector(".nk form table");
        if (page.readyState !== "complete" || !table) return null;
        const top = row => row.getBoundingClientRect().top;
        const rows = [...table.querySelectorAll("tbody tr")];
        const order = () => rows.sort((a, b) => top(a) - top(b)).map(row => row.cells[0].innerText);
        const found = [page.querySelectorAll(".nk svg").length > 0];
        for (const way of ["a", "d"]) {
            table.querySelector(`th:nth-child(3) input.${way}`).click();
            found.push(order());
        }
        return found;
    }"""
    found = seen(site, tmp_path, "notebooks/explore.html", find)
    assert found == [True, ["tap0", "lo"], ["lo", "tap0"]], "by MTU"
