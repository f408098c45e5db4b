"""The command: judge libraries, print tables, write JSON.

    python -m rl_conformance                      every library that is installed here
    python -m rl_conformance --library trl --json trl.json
    python -m rl_conformance --library openrlhf=FOLDER   from a checkout of its repository
    python -m rl_conformance --table trl.json verl.json --into page.md

Exit codes: 0 every claim that was checked holds or differs by a stated convention, 2 the request
is wrong, 3 a claim fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rl_conformance.adapters import ADAPTERS, load
from rl_conformance.registry import CLAIMS
from rl_conformance.report import Report, as_markdown, as_text, judge_library

START, END = "<!-- table -->", "<!-- end of table -->"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rl-conformance",
        description="Check claims about losses and advantages of RL for language models against "
        "the libraries that are installed here.",
    )
    parser.add_argument(
        "--library",
        action="append",
        metavar="NAME",
        help=f"which to judge: {', '.join(ADAPTERS)}, or file.py:Class of an adapter; with =FOLDER "
        "behind it for a library that is called from a checkout; may be repeated. Default: every "
        "one that can be imported.",
    )
    parser.add_argument(
        "--claim",
        default="",
        metavar="TEXT",
        help='only claims whose name contains this, such as "pairs/" or "padding".',
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports as JSON.")
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="judge nothing: print one Markdown table of reports that --json wrote.",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="PAGE",
        help=f"with --table: put it into this file, between {START} and {END}.",
    )
    return parser


def stop(sentence: str) -> NoReturn:
    """End the command: the request is wrong."""
    print(f"rl-conformance: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def read_reports(file: Path) -> list[Report]:
    try:
        return [Report.from_json(each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except OSError as error:
        stop(f"{file} cannot be read: {error.strerror}.")
    except (ValueError, TypeError, KeyError):
        stop(f"{file} is no report. Give a file that --json wrote.")


def print_table(files: Sequence[Path], page: Path | None) -> None:
    """Print the table of reports, or put it into a page."""
    table = as_markdown([report for file in files for report in read_reports(file)])
    if page is None:
        print(table, end="")
        return
    if not page.is_file():
        stop(f"{page} is no file. --into puts the table into a page that is there.")
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        stop(f"{page} has no lines {START} and {END}. Add them where the table belongs.")
    page.write_text(f"{before}{start}\n{table}{end}{after}", encoding="utf-8")


def judged(keys: Sequence[str], part_of_name: str, is_asked: bool) -> list[Report]:
    """Return the reports of the libraries that can be imported. Where one was asked for and cannot
    be, raises SystemExit with the reason."""
    reports = []
    for key in keys:
        try:
            library = load(key)
        except (ImportError, ValueError) as error:
            if is_asked:
                stop(f"{key} cannot be judged here: {error}")
            print(f"{key}: not judged, it cannot be imported here ({error})")
            continue
        report = judge_library(library, key, part_of_name)
        print(as_text(report))
        reports.append(report)
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments and return its exit code."""
    options = arguments().parse_args(argv)
    if options.table:
        print_table(options.table, options.into)
        return 0
    if not any(options.claim in claim.name for claim in CLAIMS):
        stop(f'no claim has "{options.claim}" in its name. Their names are in docs/conformance.md.')
    if options.json and not options.json.parent.is_dir():
        stop(f"{options.json.parent} is no folder. Make it before --json {options.json}.")
    reports = judged(options.library or list(ADAPTERS), options.claim, bool(options.library))
    if options.json:
        text = json.dumps([each.as_json() for each in reports], indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    bad = any(v.outcome in {"fails", "raises"} for each in reports for v in each.verdicts)
    return 3 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
