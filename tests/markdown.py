"""Reads the tables and the programs of Markdown pages back."""

import re


def tables(text):
    """Each table of a text as its caption (the bold words before it, or nothing) and its rows of
    cells, the head first; escaped characters as they are meant."""
    found = re.findall(r"(?:^\*\*(.+?)\*\*[^\n]*\n\n)?((?:^\|.*\|\n?)+)", text, re.MULTILINE)
    return [(_plain(caption), [[_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                               for line in table.splitlines()
                               if not re.fullmatch(r"[|\-: ]+", line)])
            for caption, table in found]


def program(text, heading):
    """The Python of a page's section, all of its blocks together."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def _plain(text):
    return re.sub(r"\\(.)", r"\1", text)
