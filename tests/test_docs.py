"""Links, commands, keys and headings of the documentation are those that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.command.cli_args import config_keys
from opd_megatron.config import load_config
from opd_megatron.config.objective import ObjectiveConfig
from opd_megatron.metrics import watch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {key for key, *_ in config_keys()}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^    (opd-megatron .*?)(?:\s{2,}#.*)?$", re.M)


def slug(heading: str) -> str:
    """As GitHub makes anchors of headings."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_read_from_the_readme(page: Path) -> None:
    assert page.name == "README.md" or f"(docs/{page.name})" in PAGES[0].read_text()


def test_the_readme_can_be_read_at_one_sitting() -> None:
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) < 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_commands_and_their_keys_exist(page: Path) -> None:
    text = re.sub(r"\\\n\s+", " ", page.read_text())
    for line in COMMAND.findall(text):
        words = shlex.split(re.sub(r"\[.*?\]", "", line), comments=True)
        assert words[1] in cli._COMMANDS, line
        for word in words[2:]:
            key, equals, _ = word.partition("=")
            assert not equals or key.startswith("-") or key in KEYS, f"{page.name}: {key} in {line}"
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path) -> None:
    sections = "|".join(SECTIONS)
    for key in re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)[=`]", page.read_text()):
        known = key in KEYS or any(other.startswith(f"{key}.") for other in KEYS)
        assert known or key.endswith((".py", ".md", ".yaml", ".log")), f"{page.name}: {key}"


def test_what_findings_name_is_a_heading_of_the_troubleshooting() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    source = Path(watch.__file__).read_text()
    symptoms = [heading for heading in re.findall(r"^## (.+)$", page, re.M) if f'"{heading}"' in source]
    assert len(symptoms) == len({*symptoms}) >= 4


def test_the_yaml_of_the_pages_is_a_configuration(tmp_path: Path) -> None:
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)):
            (tmp_path / f"{number}.yaml").write_text(block)
            load_config(tmp_path / f"{number}.yaml")  # raises for what is no configuration


def test_the_defaults_that_the_pages_name_are_the_defaults() -> None:
    assert ObjectiveConfig().type == "reverse_kl"
