"""Which of the configurations that mergekit publishes can be carried out: its examples and those in its documentation.

    git clone https://github.com/arcee-ai/mergekit && python benchmarks/mergekit_examples.py mergekit/

Prints a line for each: what it asks for, or why it is refused. The models that they name are not needed.
"""

import argparse
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from lmc.errors import LmcError
from lmc.merge.disk.mergekit_language import configuration, read_configuration

FENCE = re.compile(r"^[ \t]*```ya?ml\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def found(folder: Path) -> Iterator[tuple[str, str]]:
    """Every example, with what it is called."""
    for file in sorted(folder.glob("examples/**/*.y*ml")):
        yield str(file.relative_to(folder)), file.read_text()
    for file in sorted(folder.glob("**/*.md")):
        for i, block in enumerate(FENCE.findall(file.read_text()), start=1):
            yield f"{file.relative_to(folder)}, block {i}", block


def outcome(text: str) -> str:
    """What a configuration asks for, or the error."""
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file.write(text)
        file.flush()
        try:
            config = configuration(read_configuration(Path(file.name)))
        except LmcError as error:
            return "refused: " + str(error).replace(f"{file.name}: ", "")
    sources = [source for part in config.slices for source in part.sources]
    said = "".join(f"; {warning.message}" for warning in caught)
    return f"read: {config.method}, {len(config.slices)} slices, {len({s.model for s in sources})} models{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of mergekit")
    print("| configuration | outcome |\n|---|---|")
    for name, text in found(parser.parse_args().folder):
        print(f"| {name} | {outcome(text)} |")


if __name__ == "__main__":
    main()
