"""The README as a package index shows it, where links into this repository lead nowhere.

``make dist URL=https://…`` makes them absolute, from the address where the repository's files are
shown. Without an address, pictures are left out and links are plain text.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](target) or ![text](target) where the target is a file of the repository
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://)([^)]+)\)")


def packaged(text: str, address: str | None) -> str:
    """``text`` with its relative links under ``address``, or without them."""

    def link(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if address:
            return f"{mark}[{words}]({address.rstrip('/')}/{target})"
        return "" if mark else words

    return _LINK.sub(link, text)


class PackagedReadme(MetadataHookInterface):
    """Called by the build."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = packaged(text, os.environ.get("GRADXFORM_FILES_URL"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
