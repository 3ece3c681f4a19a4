"""python -m bench static | tables | picture | roofline | report | compare: parses, calls, prints."""

import argparse
from pathlib import Path

from bench import static
from bench.measure import predicted
from bench.report import figures as report
from bench.report import picture, tables


def _static(chosen: argparse.Namespace) -> int:
    if chosen.cost:
        return _cost(chosen)
    found = []
    for name, count in static.COUNTS.items():
        figures = count(True)
        if chosen.check:
            found += static.check(name, static.load(name), figures)
        else:
            static.write(name, figures)
    if not chosen.check:
        tables.rewrite_pages()
    print("\n".join(found) or ("nothing differs" if chosen.check else f"written to {static.FOLDER}"))
    return 1 if found else 0


def _cost(chosen: argparse.Namespace) -> int:
    """Every workload on the card, as it is predicted; the record is that of RECORDED_CARD."""
    compared = []
    for one in predicted.compare(chosen.cost):
        compared.append(one)
        print(predicted.text(one, chosen.cost), flush=True)
    if chosen.cost != predicted.RECORDED_CARD:
        return 0
    new = predicted.figures(compared)
    if not chosen.check:
        static.write("cost", new)
        return 0
    found = static.changes(static.load("cost")["rows"], new["rows"], "cost")
    print("\n".join(found) or "nothing differs")
    return 1 if found else 0


def _tables(chosen: argparse.Namespace) -> int:
    changed = tables.rewrite_pages()
    print("\n".join(f"docs/{page.name} is written" for page in changed) or "all tables are up to date")
    return 0


def _roofline(chosen: argparse.Namespace) -> int:
    print(tables.predicted())
    return 0


def _report(chosen: argparse.Namespace) -> int:
    paths = chosen.files or [
        p for p in (Path("build/bench.json"), Path("build/gpu"), report.RESULTS) if p.exists()
    ]
    print(report.write(paths, chosen.out))
    print(f"{chosen.out / 'report.md'} is written, with its plots.")
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    print(report.compare(report.read([chosen.a]), report.read([chosen.b])))
    return 0


def _picture(chosen: argparse.Namespace) -> int:
    picture.draw()
    print(f"{picture.FILE} is written")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("static", help="count launches, bytes and parameters; write them")
    command.add_argument("--check", action="store_true", help="write nothing: say what differs, exit code 1")
    command.add_argument(
        "--cost",
        nargs="?",
        const=predicted.RECORDED_CARD,
        choices=predicted.RATES,
        help="instead: the workloads' times on a card, predicted from machine code (a minute or two)",
    )
    command.set_defaults(run=_static)

    command = commands.add_parser(
        "tables", help="write the tables of docs/ from bench/results and the planner"
    )
    command.set_defaults(run=_tables)

    command = commands.add_parser("roofline", help="predicted floors of the workloads on four cards")
    command.set_defaults(run=_roofline)

    command = commands.add_parser("report", help="tables and plots of measured results")
    command.add_argument("files", nargs="*", type=Path, help="folders of bench.gpu, files of pytest bench")
    command.add_argument(
        "--out", type=Path, default=Path("build/report"), help="folder for report.md and plots"
    )
    command.set_defaults(run=_report)

    command = commands.add_parser("compare", help="two runs: ratios, and what is within noise")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.set_defaults(run=_compare)

    command = commands.add_parser("picture", help="draw what is fused: docs/fused-recursion.png")
    command.set_defaults(run=_picture)

    chosen = parser.parse_args(argv)
    code: int = chosen.run(chosen)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
