"""Which of many alike cases `make test` runs; `make test-all` runs every one."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_of(cases: Iterable[Any], count: int = 3) -> list[Any]:
    """The cases as parameters of a test, those after the first `count` marked `long`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if n < count else pytest.mark.long,
        )
        for n, case in enumerate(cases)
    ]
