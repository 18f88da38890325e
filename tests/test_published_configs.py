"""config.json as published: each loads, or is refused for a field that changes the function."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoo.errors import UnusedFieldsWarning, ZooError
from zoo.pretrained import locate

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "data" / "published_configs.yaml").read_text(encoding="utf-8")
)


def config(name: str) -> dict[str, Any]:
    fields = dict(PUBLISHED[name])
    return {**config(fields.pop("like")), **fields} if "like" in fields else fields


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood(name: str, tmp_path: Path) -> None:
    fields = config(name)
    refused = fields.pop("refused", "")
    fields = {
        key: value for key, value in fields.items() if (key, value) != ("architectures", None)
    }
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedFieldsWarning)
        if refused:
            with pytest.raises(ZooError, match=refused):
                locate(tmp_path)
        else:
            locate(tmp_path)
