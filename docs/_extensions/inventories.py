"""The inventories of other projects' sites, fetched once if the network allows.

An inventory lists the names that a site documents. A build without network uses the copies of an
earlier build, and without those it makes no links.
"""

import threading
import urllib.request
from pathlib import Path

SECONDS = 5  # the time to wait for all sites together
MAGIC = b"# Sphinx inventory version"


def reachable(sites: dict[str, str], folder: Path) -> dict[str, tuple[str, str]]:
    """The value of ``intersphinx_mapping``: the sites whose inventory is in ``folder`` now."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.inv" for name in sites}
    threads = [
        # a daemon: the build neither waits for a slow name server nor ends with it
        threading.Thread(target=_fetch, args=(f"{url}/objects.inv", files[name]), daemon=True)
        for name, url in sites.items()
        if not files[name].exists()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        if thread.is_alive():
            break
    return {name: (sites[name], str(file)) for name, file in files.items() if file.exists()}


def _fetch(url: str, file: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "gradxform-docs"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content = answer.read()
    except (OSError, ValueError):
        return
    if content.startswith(MAGIC):
        partial = file.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(file)
