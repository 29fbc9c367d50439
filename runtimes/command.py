# SPDX-License-Identifier: Apache-2.0
"""Another program, run to its end; what it complains of becomes one error."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from ..ground.errors import TurbopocketError


def run(command: Sequence[str], label: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints, in this environment or the given one. TurbopocketError with the last of its complaint."""
    env = os.environ | {"LC_ALL": "C"} if environment is None else environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        complaint = (done.stderr.strip() or done.stdout.strip() or "nothing on stderr").splitlines()
        raise TurbopocketError(f"`{label}` failed with {done.returncode}: {complaint[-1]}")
    return done.stdout
