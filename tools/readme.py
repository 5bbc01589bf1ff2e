"""Put into README.md what programs print: the report (`make docs`) and the figures of benchmarks/dispatch.py.

    python tools/readme.py [--check] [--dispatch TEXT_FILE]

Blocks stand between `<!-- name -->` and `<!-- end -->`; a `report:` block names the command it shows.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from attnrt.cli import app

README = Path(__file__).resolve().parent.parent / "README.md"
REPORT = re.compile(r"<!-- report: (.*?) -->\n.*?<!-- end -->", re.DOTALL)
DISPATCH = re.compile(r"<!-- dispatch -->\n.*?<!-- end -->", re.DOTALL)


def report_block(match: re.Match[str]) -> str:
    command = match[1]
    output = CliRunner().invoke(app, command.split()).stdout.rstrip()
    return f"<!-- report: {command} -->\n```\n$ attnrt {command}\n{output}\n```\n<!-- end -->"


def with_reports(text: str) -> str:
    """README's text with every report block as the command prints it now."""
    return REPORT.sub(report_block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something would change")
    parser.add_argument("--dispatch", type=Path, help="what benchmarks/dispatch.py printed")
    options = parser.parse_args()
    old = README.read_text()
    new = with_reports(old)
    if options.dispatch:
        block = f"<!-- dispatch -->\n```\n{options.dispatch.read_text().rstrip()}\n```\n<!-- end -->"
        new = DISPATCH.sub(lambda _: block, new)
    if options.check:
        sys.exit("README.md shows another report than the program prints: run make docs" if new != old else 0)
    README.write_text(new)


if __name__ == "__main__":
    main()
