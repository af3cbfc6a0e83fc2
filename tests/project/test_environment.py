"""pyproject.toml, environment.yml and constraints.txt say the same."""

import json
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import lmc

ROOT = Path(__file__).parents[2]
CONDA_NAMES = {"pytorch": "torch"}
OWN_NAME = "lmc-lab"

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def bounds(lines: list[str]) -> dict[str, SpecifierSet]:
    needs = [Requirement(line) for line in lines]
    return {canonicalize_name(need.name): need.specifier for need in needs if need.name != OWN_NAME}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def test_conda_environment_matches_core_and_notebooks():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert {"pip": ["-e ."]} in conda, "the package itself is installed by pip, from the checkout"
    lines = [line for line in conda if isinstance(line, str) and line != "pip"]
    found = {CONDA_NAMES.get(name, name): spec for name, spec in bounds(lines).items()}
    wanted = bounds([*PROJECT["dependencies"], *EXTRAS["notebooks"]])
    assert found == wanted | {"python": SpecifierSet(PROJECT["requires-python"])}


def test_every_dependency_is_pinned_within_its_bounds():
    pinned = pins()
    for group in (PROJECT["dependencies"], *EXTRAS.values()):
        for name, spec in bounds(group).items():
            assert name in pinned, f"{name} is missing in constraints.txt"
            assert pinned[name] in spec, f"constraints.txt pins {name} {pinned[name]}, pyproject.toml asks for {spec}"


def test_constraints_hold_public_versions_only():
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9A-Za-z.]*", version), f"{name}=={version}: no local suffix, address or path"


def test_core_stays_small():
    assert set(bounds(PROJECT["dependencies"])) == {"torch", "numpy", "scipy", "safetensors", "tqdm"}


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert lmc.__version__ == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert json.loads((ROOT / "lmc/views/lab/package.json").read_text(encoding="utf-8"))["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
