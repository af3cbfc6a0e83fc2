"""What README.md says is true: its Python runs, its commands and files exist, its names are in the package."""

import re
from pathlib import Path

import lmc

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python_runs_as_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), namespace)
    assert namespace["naive"].barrier > 1.0
    assert namespace["found"].barrier < 0.03
    assert namespace["after"].barrier < 0.03
    assert "nats" in capsys.readouterr().out


def test_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"\bmake (\w+)", "\n".join(blocks("")) + " ".join(re.findall(r"`([^`\n]+)`", README))))
    assert {"demo", "test", "lab"} <= named <= targets


def test_files_exist():
    linked = [path for path in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in path]
    named = re.findall(r"`((?:lmc|tools|benchmarks|notebooks|data|docs|tests)/[\w./-]*)`", README)
    assert linked and named
    assert [path for path in linked + named if not (ROOT / path).exists()] == []


def test_names_are_public():
    def resolve(dotted: str) -> object:
        found: object = lmc
        for part in dotted.split(".")[1:]:
            found = getattr(found, part, None)
        return found

    named = set(re.findall(r"`(lmc(?:\.[A-Za-z_]\w*)+)", README))
    assert named
    assert sorted(name for name in named if resolve(name) is None) == []
