"""The command `partial-fc report RUN RUN ...`: runs side by side on one page."""

from __future__ import annotations

from pathlib import Path

from partial_fc.training.cli.parser import CommandParser, add_traceback
from partial_fc.training.report.compare import read_run, run_names, write_comparison
from partial_fc.training.run import check_new_file


def report_command(arguments: list[str]) -> None:
    """`partial-fc report RUN RUN ...`: write the page. It runs in one process. Raises UserError for mistakes."""
    parser = CommandParser("report", "Compare runs on one page.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or of evaluations in a run folder")
    parser.add_argument(
        "--output", default="comparison.html", metavar="FILE", help="the page to write (default comparison.html)"
    )
    add_traceback(parser)
    options = parser.parse_args(arguments)
    output = Path(options.output)
    check_new_file(output, "--output")
    runs = [read_run(path, name) for path, name in zip(options.runs, run_names(options.runs), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(runs, output)
    print(f"comparison of {len(runs)} runs written to {output}")
