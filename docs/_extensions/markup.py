"""reStructuredText for generated pages."""

import re
from collections.abc import Iterable, Sequence

_MARKUP = re.compile(r"(``.+?``|:\w+(?::\w+)?:`[^`]+`|`[^`]+`_)", re.S)


def title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"


def escaped(text: str) -> str:
    """Text in which only double backticks and roles are markup."""
    parts = _MARKUP.split(text)
    parts[::2] = [re.sub(r"([*|`\\]|_\b)", r"\\\1", part) for part in parts[::2]]
    # a letter and a full stop would begin a list
    return re.sub(r"^(\w+[.)])(?=\s|$)", r"\\\1", "".join(parts))


def sentence(text: str) -> str:
    """Text that begins with a capital, where it begins with a word, and ends with a full stop."""
    text = text.strip()
    if len(text) < 4:  # a symbol
        return text
    if re.match(r"(a|an|[a-z][a-z-]+)\b", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", ":", "?")) else f"{text}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]], widths: str = "auto") -> str:
    """A list table of cells in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (header, *rows):
        for i, cell in enumerate(row):
            first, *rest = cell.splitlines() or [""]
            lines.append(f"   {'*' if i == 0 else ' '} - {first}")
            lines += [f"       {line}" for line in rest]
    return "\n".join(lines) + "\n"
