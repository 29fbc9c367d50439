# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch's Python modules, which may not be installed and talk when they are imported."""

import importlib
import logging
import warnings
from typing import Any

from ...ground.errors import TurbopocketError
from ...ground.extras import install_hint


def executorch_module(name: str) -> Any:
    """ExecuTorch's module of that name, without its start-up talk. Raises TurbopocketError when it is missing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"executorch.{name}")
    except ImportError as error:
        raise TurbopocketError(f"ExecuTorch is not installed: {error}", hint=install_hint("executorch")) from error
    finally:
        logging.disable(level)
