"""Pages of the site that are made when it is built: the reference, notebooks, and the pages that stand beside docs/.

MkDocs calls the functions here (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import netns_kit
from docs import man_pages
from docs.site_notebooks import Pages

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages at the top of the repository, and their names on the site."""
TITLES = {
    "arguments": "Arguments",
    "checkup": "Checkup of the host",
    "dhcp": "DHCP",
    "display": "Displays",
    "dns": "DNS",
    "errors": "Errors",
    "forwarder": "Forwarder: ways in",
    "gateway": "Gateway: flows, faults, counters",
    "host": "The host",
    "namespace": "Namespace",
    "network": "Network and its members",
    "policy": "Policy",
    "stack": "Limits of the stack",
    "subnet": "Subnets",
    "tap": "TapDevice",
    "uplink": "Uplink: ways out",
    "userstack": "UserStack",
}
"""Title of the reference page of each folder."""
NOTEBOOKS = Pages()
LINK = re.compile(r"(\]\()(?!\w+:)([^)\s#]*)(#[^)\s]*)?(\))")


def reference() -> dict[str, list[str]]:
    """Return the public names by the folder that they come from."""
    names: dict[str, list[str]] = {}
    homes: dict[str, str] = vars(netns_kit)["_HOMES"]
    for home, found in homes.items():
        names.setdefault(home.partition(".")[0], []).extend(found.split())
    return {
        folder: sorted(names[folder], key=str.lower)
        for folder in sorted(names, key=lambda each: TITLES[each])
    }


def on_config(config: Any) -> Any:
    """Add the pages of the reference to the navigation."""
    pages = ["reference/index.md", *({TITLES[folder]: f"reference/{folder}.md"} for folder in reference())]
    config.nav = [{"Reference": pages} if "Reference" in each else each for each in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    pages = {site: _on_the_site((ROOT / name).read_text(encoding="utf-8")) for name, site in BESIDE.items()}
    overview = ["# Reference", "", "Everything that `import netns_kit` offers.", ""]
    for folder, names in reference().items():
        title = TITLES[folder]
        entries = "".join(f"\n::: netns_kit.{name}\n" for name in names)
        pages[f"reference/{folder}.md"] = f"# {title}\n{entries}"
        links = ", ".join(f"[{name}]({folder}.md#netns_kit.{name})" for name in names)
        overview.append(f"- **[{title}]({folder}.md)**: {links}")
    pages["reference/index.md"] = "\n".join(overview) + "\n"
    pages |= NOTEBOOKS.made()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links from docs/ to the pages at the top of the repository lead to theirs on the site."""
    depth = page.file.src_uri.count("/")
    return LINK.sub(
        lambda link: link[1] + _to_site(link[2], "../" * depth) + (link[3] or "") + link[4], markdown
    )


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Put what came out of the cells of a notebook into its page."""
    return NOTEBOOKS.filled(html)


def on_post_build(config: Any) -> None:
    """Write the pages of man(1) beside those of the site."""
    man_pages.write(Path(config.site_dir) / "man")


def _to_site(target: str, up: str) -> str:
    name = target.rpartition("/")[2]
    if target.endswith(".ipynb"):
        return target.removesuffix(".ipynb") + ".md"
    return up + BESIDE[name] if target.startswith("../") and name in BESIDE else target


def _on_the_site(text: str) -> str:
    """Return a page from the top of the repository as if it stood in docs/."""

    def moved(link: re.Match[str]) -> str:
        target = (
            link[2].removeprefix("docs/") if link[2].startswith("docs/") else BESIDE.get(link[2], link[2])
        )
        return link[1] + target + (link[3] or "") + link[4]

    return LINK.sub(moved, text)
