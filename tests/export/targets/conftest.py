# SPDX-License-Identifier: Apache-2.0
"""Here tracing itself is tested, so nothing that was traced before is used."""

from collections.abc import Iterator

import pytest

from ...kept_traces import traced_anew


@pytest.fixture(scope="module", autouse=True)
def traced_here() -> Iterator[None]:
    with traced_anew():
        yield
