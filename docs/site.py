"""A hook of mkdocs.yml: what the pages of docs/ link to outside of it becomes part of the site, and so a reference.

A file of the repository that a page names is at repository/ on the site: Markdown as a page, any other as it is.
reference.md is made of what `linformer_kernels.__all__` and MORE name, from their docstrings.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PLACE = "repository"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
MORE = {"integrations.transformers": ("linformerize", "load"), "distributed": ("parallelize", "fully_shard")}


def on_files(files: Any, config: Any) -> Any:
    waiting = ["README.md", *(f"docs/{name}" for name in files.src_uris if name.endswith(".md"))]
    seen: set[str] = set()
    while waiting:
        source = waiting.pop()
        for link in LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
            if target.startswith(("docs/", "..")) or target in seen or not (ROOT / target).is_file():
                continue
            seen.add(target)
            waiting += [target] * target.endswith(".md")
    for name in sorted(seen | {"README.md"}):
        files.append(File.generated(config, f"{PLACE}/{name}", content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead where their targets lie on the site; a folder of the repository, which has no page, is plain text."""
    here = page.file.src_uri
    own = here.removeprefix(f"{PLACE}/") if here.startswith(f"{PLACE}/") else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), link[2]))
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"{PLACE}/{target}"
        path = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"{link[1]}{path}{link[3] or ''}{link[4]}"

    folders = re.sub(
        r"\[([^\]]+)\]\(([^)\s#:]+)\)",
        lambda link: link[1] if (ROOT / posixpath.dirname(own) / link[2]).is_dir() else link[0],
        markdown,
    )
    return LINK.sub(moved, folders)


def reference() -> str:
    tree = ast.parse((ROOT / "linformer_kernels" / "__init__.py").read_text(encoding="utf-8"))
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    wanted = [f"linformer_kernels.{name}" for name in names if not name.startswith("__")]
    wanted += [f"linformer_kernels.{module}.{name}" for module, held in MORE.items() for name in held]
    return "# Reference\n\nMade from the docstrings.\n\n" + "".join(f"::: {name}\n\n" for name in wanted)
