"""Write docs/schemas: JSON Schemas of registry.yaml, of the files of specs and of native configs.

python tools/schemas.py           # rewrite the files
python tools/schemas.py --check   # exit with 1 if a file is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from converters.spec_files import CommonFile, DialectFile, NativeFile  # noqa: E402
from converters.validation import Entry  # noqa: E402
from zoo import registry  # noqa: E402
from zoo.components.config import Parsed  # noqa: E402

FOLDER = ROOT / "docs" / "schemas"
FILES: dict[str, type[Entry]] = {
    "registry": registry.RegistryFile,
    "dialect": DialectFile,
    "native": NativeFile,
    "common": CommonFile,
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each kind of file and of each architecture's config, by path in the folder."""
    made = {name: model.model_json_schema() for name, model in FILES.items()}
    for entry in registry.architectures().values():
        made.setdefault(f"configs/{entry.module}", _of_config(entry))
    return made


def _of_config(entry: registry.Architecture) -> dict[str, Any]:
    config = entry.config_class
    schema: dict[str, Any] = config.model_json_schema()
    schema["description"] = f"The config of zoo.models.{entry.module}, as `to_dict` gives it."
    fields = schema["properties"]
    fields["head"]["enum"] = list(config.heads_known)
    for name, field in fields.items():
        default = config.model_fields[name].default
        if default is None and "anyOf" not in field:
            del field["default"]  # derived from other fields
        if isinstance(default, Parsed):
            field["default"] = default.to_json()
    return schema


def texts() -> dict[str, str]:
    """The text of each file by its path in the folder."""
    return {
        f"{name}.json": json.dumps({"$schema": DIALECT, **schema}, indent=1, ensure_ascii=False)
        + "\n"
        for name, schema in schemas().items()
    }


def main() -> int:
    """Write the files, or compare them."""
    made = texts()
    if "--check" in sys.argv[1:]:
        there = {str(p.relative_to(FOLDER)): p.read_text() for p in FOLDER.rglob("*.json")}
        return int(there != made)
    for name, text in made.items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
