#!/usr/bin/env python
"""Lists the licences of the installed packages; fails if one is not among those allowed.

    python .ci/licences.py > results/reliability/licences.md
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterable

ALLOWED = {"0BSD", "AFL-2.1", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC",
           "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"}
"""By their SPDX names: permissive ones, and MPL-2.0, whose terms are for changes of its files."""

SPDX = {
    "3-Clause BSD License": "BSD-3-Clause", "Apache 2.0": "Apache-2.0",
    "Apache License": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0", "BSD 3-Clause": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause", "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What packages without an SPDX expression call their licence."""

READ_BY_HAND = {"namex": "Apache-2.0"}
"""Licences of packages whose metadata has none, from the file LICENSE in them."""


def licence_of(package: importlib.metadata.Distribution) -> str:
    """An SPDX expression, or what the metadata say where that is no known name; may be empty."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [value.rpartition(" :: ")[2] for value in metadata.get_all("Classifier", [])
                   if value.startswith("License :: ")]
    text = (metadata.get("License") or "").strip()
    names = classifiers or text.splitlines()[:1] or [READ_BY_HAND.get(package.name, "")]
    # Several classifiers do not say whether one may choose: all of them have to be allowed.
    return " AND ".join(SPDX.get(name.strip(), name.strip()) for name in names)


def is_allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met by the licences that are allowed.

    With parentheses, which are rare, every licence in it has to be allowed.
    """
    choices = [expression] if "(" in expression else re.split(r"\bOR\b", expression)
    return any(all(name.strip("() ") in ALLOWED for name in re.split(r"\b(?:AND|OR)\b", choice))
               for choice in choices)


def table_of(packages: Iterable[importlib.metadata.Distribution]) -> tuple[str, list[str]]:
    """A table in Markdown, and a line for each package whose licence is not allowed."""
    rows = sorted({(package.name, package.version, licence_of(package)) for package in packages},
                  key=lambda row: row[0].lower())
    lines = ["| Package | Version | Licence |", "|---|---|---|",
             *(f"| {name} | {version} | {licence} |" for name, version, licence in rows)]
    return "\n".join(lines), [
        f"{name} {version}: {licence or 'no licence'} is not among those allowed"
        for name, version, licence in rows if not is_allowed(licence)]


def main() -> int:
    table, refused = table_of(importlib.metadata.distributions())
    print("# Licences of what is installed\n\nPackages of `requirements.txt` and what they need, "
          "written by `python .ci/licences.py`.\n")
    print(table)
    print(*refused, sep="\n", end="\n" if refused else "", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
