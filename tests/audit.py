"""Known vulnerabilities among the pinned packages, by pip-audit; says so where it cannot look."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"


def main() -> None:
    if find_spec("pip_audit") is None:
        print("audit skipped: pip-audit is not installed")
        return
    options = ["--vulnerability-service", "osv", "--no-deps", "--disable-pip", "--timeout", "10"]
    command = [sys.executable, "-m", "pip_audit", *options, "--format", "json", "-r", str(PINS)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):  # without a network it has nothing to say on stdout
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"audit skipped: pip-audit cannot ask its service ({why[:100]})")
        return
    asked = [package for package in packages if "skip_reason" not in package]
    found = [(p, bug) for p in asked for bug in p["vulns"]]
    for package, bug in found:
        mend = ", ".join(bug["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {bug['id']}, mended in {mend}")
    print(f"audit: {len(asked)} of {len(packages)} packages looked up, {len(found)} known bugs")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
