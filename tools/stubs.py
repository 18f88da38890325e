"""Write zoo/__init__.pyi, which tells type checkers where the public names of zoo come from.

python tools/stubs.py
"""

from pathlib import Path

import zoo

STUB = Path(zoo.__file__).with_suffix(".pyi")
NOTE = "# Made by tools/stubs.py of the table PUBLIC in zoo/__init__.py. Do not edit."


def stub() -> str:
    """Return what zoo/__init__.pyi should be."""
    lines = []
    for name, target in zoo.PUBLIC.items():
        module, _, attribute = target.partition(":")
        package, _, last = module.rpartition(".")
        source, what = (module, attribute) if attribute else (package, last)
        lines.append(f"from {source} import {what} as {name}")
    names = [f'    "{name}",' for name in sorted(zoo.PUBLIC)]
    tables = ["__version__: str", "PUBLIC: dict[str, str]", "VERBS: dict[str, str]"]
    parts = [NOTE, *sorted(lines), "", *tables, "", "__all__ = [", *names, "]"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
