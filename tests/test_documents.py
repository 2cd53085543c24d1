"""README and doc/: the length of the README, and the links, files, folders and commands of every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "doc").rglob("*.md"))]
FOLDERS = ("config", "core", "doc", "models", "operator_cxx", "symbol", "tests", "utils")
WRITTEN_BY_THE_READER = {"config/birds.py", "config/brightness.py"}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
FILE = re.compile(r"[\w@./-]+\.(?:py|pyx|pyi|h|cc|cu|cuh|md|toml|sh)")


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def links(text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if not target.startswith("https://"):
            yield target


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_named(text: str) -> Iterator[str]:
    """Yield what is in backticks and looks like a file or folder of the project."""
    for code in re.findall(r"`([^`\s<]+)`", FENCE.sub("", text)):
        if FILE.fullmatch(code) or code.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            yield code


def exists(name: str) -> bool:
    if "/" in name or (ROOT / name).exists():
        return name in WRITTEN_BY_THE_READER or (ROOT / name).exists()
    return any(True for folder in FOLDERS for _ in (ROOT / folder).rglob(name))


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_links_to_every_page_or_its_folder() -> None:
    linked = {ROOT / target.partition("#")[0] for target in links((ROOT / "README.md").read_text())}
    assert [page for page in PAGES[1:] if not {page, page.parent} & linked] == []


def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_named_files_exist(page: Path) -> None:
    assert [name for name in files_named(page.read_text()) if not exists(name)] == []


def test_commands_name_scripts_and_configs_that_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"\bpython3? +([\w./-]+\.py)", text) + re.findall(r"--config +(\S+?\.py)\b", text)
    assert [name for name in named if not exists(name)] == []


def test_make_has_the_targets_that_are_named(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", page.read_text(), re.M)
    assert {name for names in named for name in names.split()} <= targets


def test_the_file_map_names_every_folder_and_no_other() -> None:
    _, _, file_map = (ROOT / "README.md").read_text().partition("## File map")
    lines = [line for line in file_map.split("```")[1].splitlines() if re.match(r"\w+/ ", line)]
    assert sorted(line.split("/")[0] for line in lines) == sorted(FOLDERS)
    for line in lines:
        folder, *inside = re.findall(r"(?<!\S)(\w+)/(?=[\s,:;]|$)", line)
        assert [name for name in inside if not (ROOT / folder / name).is_dir()] == [], line
