"""Files that the build generates."""

from pathlib import Path


def write(file: Path, content: str | bytes) -> None:
    """Writes a file if its content has changed, so that unchanged pages are not built again."""
    data = content.encode() if isinstance(content, str) else content
    if not file.exists() or file.read_bytes() != data:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def remove_others(folder: Path, kept: set[str], pattern: str = "*.rst") -> None:
    """Removes pages of names that no longer exist."""
    for file in folder.glob(pattern):
        if file.name not in kept:
            file.unlink()
