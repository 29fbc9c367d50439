# SPDX-License-Identifier: Apache-2.0
"""What has to be installed for more than opening and drawing: the extras of the installed distribution."""

import re
from collections.abc import Iterable
from importlib import metadata

DISTRIBUTION = "turbopocket"
_EXTRA = re.compile(r";\s*extra\s*==\s*['\"]([\w-]+)['\"]\s*$")
_NOT_FOR_USERS = "dev"


def install_hint(module: str) -> str | None:
    """Returns the one command that brings a module which is not installed, and what is used together with it.

    It names packages, not an extra: that of turbopocket itself would have to be found in the same place as turbopocket,
    which may be a folder or a wheel that is gone. None for a module that no extra has.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return None
    needed = packages_with(module, requirements)
    return f"pip install {' '.join(map(_quoted, needed))}" if needed else None


def packages_with(module: str, requirements: Iterable[str]) -> list[str]:
    """Returns all requirements of the first extra that has the module among them, as PEP 508 writes them without the
    extra's name; none where there is no such extra."""
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        if (found := _EXTRA.search(requirement)) and found[1] != _NOT_FOR_USERS:
            package = requirement[: found.start()].strip()
            if _module_of(package) != DISTRIBUTION:  # extras stand on one another
                extras.setdefault(found[1], []).append(package)
    top = module.partition(".")[0].lower()
    for packages in extras.values():
        if any(_module_of(package) == top for package in packages):
            return packages
    return []


def _module_of(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    return name[0].replace("-", "_").lower() if name else ""


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if re.search(r"[<>\[]", requirement) else requirement
