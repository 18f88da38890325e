"""Draft the files of a new architecture from a reference class and a similar architecture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scaffold import Draft, draft

from zoo.errors import UsageError, ZooError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="new_arch", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="name of the architecture")
    parser.add_argument("--like", required=True, metavar="ARCH", help="similar architecture")
    parser.add_argument("--reference", required=True, metavar="CLASS", help="class of transformers")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of the tiny config; a.b is a nested field",
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--only-data", action="store_true", help="require the similar model: two files"
    )
    files.add_argument(
        "--own-model", action="store_true", help="write a model file even if the similar model fits"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the files instead of writing them"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_args(arguments)
    try:
        drafted = draft(
            args.name,
            args.like,
            args.reference,
            only_data=True if args.only_data else False if args.own_model else None,
            force=args.force,
            settings=dict(map(_setting, args.set)),
        )
        if args.dry_run:
            _show(drafted)
        else:
            for path in _relative(drafted.write(force=args.force)):
                print(f"wrote {path}")
        _report(drafted)
    except ZooError as error:
        print(f"new_arch: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: expected FIELD=VALUE")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def _relative(paths: list[Path]) -> list[str]:
    here = Path.cwd()
    return [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in paths]


def _show(drafted: Draft) -> None:
    for path, text in drafted.files.items():
        if path == "registry.yaml":
            print(f"--- {path}, what is new in it")
            print("\n".join(drafted.added))
        else:
            print(f"--- {path}")
            print(text)


def _report(drafted: Draft) -> None:
    if drafted.only_data:
        print(f"\n{drafted.name} is only data, by its names and shapes: two files.")
    else:
        print(f"\n{drafted.name} needs a model of its own: three files.")
    for title, items in (("Left to a person", drafted.marks), ("Loading says", drafted.verdict)):
        if items:
            print(f"\n{title}:")
            print(*(f"  {item}" for item in items), sep="\n")
    print(f"\nWhether it computes the same, parity says: python -m zoo verify {drafted.name}")


if __name__ == "__main__":
    sys.exit(main())
