"""README.md and docs/: Python blocks run, commands have the options that they are given, links lead somewhere.

A page is one program: its ```python blocks, in order. Lines keep their numbers, so a traceback names the page's line.
"""

import functools
import re

import pytest
from test_package import ROOT, python, succeeded

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "emulator" / "README.md"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"python (-m (?:bench|linformer_kernels)[.\w]*|(?:examples|docs/results)/\w+\.py)([^\n`|]*)")


def name_of(page) -> str:
    return page.relative_to(ROOT).as_posix()


def program(page) -> str:
    """The Python blocks of a page, and an empty line for each line of anything else."""
    text, lines = page.read_text(), []
    blocks = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(blocks), f"{name_of(page)}: a block that is indented or has no plain language"
    for block in blocks:
        assert block[1] in ("python", "console", "text", "bibtex"), f"{name_of(page)}: a block of language {block[1]!r}"
        if block[1] == "python":
            lines += [""] * (text.count("\n", 0, block.start(2)) - len(lines)) + block[2].splitlines()
    return "\n".join(lines)


# test_deploying.py runs deploying.md, and its program in C++ beside it.
@pytest.mark.parametrize("page", [p for p in PAGES if program(p) and p.stem != "deploying"], ids=name_of)
def test_snippets_run(page, tmp_path):
    script = tmp_path / f"{page.stem}_md.py"
    script.write_text(program(page))
    launcher = TORCHRUN if "init_process_group" in script.read_text() else ()
    printed = succeeded(python(*launcher, script, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"))
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert set(rows) <= set(page.read_text().splitlines()), "the page's table is another"


@functools.cache
def options_of(command: str) -> set[str]:
    return set(re.findall(r"--[\w-]+", succeeded(python(*command.split(), "--help", cwd=ROOT))))


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_commands_have_these_options(page):
    for command, arguments in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        assert command.startswith("-m") or (ROOT / command).exists(), f"{command} does not exist"
        named = set(re.findall(r"--[\w-]+", arguments))
        assert not named or named <= options_of(command), f"python {command} has no {named - options_of(command)}"


def anchors(page) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in index] == ["README.md"]


def test_the_site_has_every_page():
    """mkdocs lists pages that its menu lacks, but does not call that an error."""
    menu = set(re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    made = {"repository/README.md", "reference.md"}
    assert menu == {page.name for page in PAGES[1:]} | made
