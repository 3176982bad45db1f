"""Reads the tables of Markdown pages back."""

import re


def tables(text):
    """Each table of a text as its caption (the bold words before it, or nothing) and its rows of
    cells, the head first; escaped characters as they are meant."""
    found = re.findall(r"(?:^\*\*(.+?)\*\*[^\n]*\n\n)?((?:^\|.*\|\n?)+)", text, re.MULTILINE)
    return [(_plain(caption), [[_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                               for line in table.splitlines()
                               if not re.fullmatch(r"[|\-: ]+", line)])
            for caption, table in found]


def _plain(text):
    return re.sub(r"\\(.)", r"\1", text)
