"""How long the import and the quick answers of the command line take.

    python -m benchmarks.startup

Each line is the median of fresh processes that take turns. Limits: the import may add 0.1 s to that
of JAX and Optax; help, version and a config error must answer in under a second.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import turns

RUNS = 9
PEERS = "import jax, optax"
BAD_CONFIG = '[training]\nepoch = 3\n[optimizers.adam]\nmethod = "adam"\nlearning_rat = 0.1\n'


def start(*args: str) -> None:
    """Runs Python with these arguments to its end."""
    # one thread of BLAS: starting a pool would be measured too
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "bad.toml")
        config.write_text(BAD_CONFIG)
        cli = "from gradxform.lab.cli import main; main()"
        every_name = "import gradxform as gx; [getattr(gx, name) for name in gx.__all__]"
        commands = {
            "import jax, optax": ("-c", PEERS),
            "... and gradxform": ("-c", f"{PEERS}, gradxform"),
            "... and all its names": ("-c", f"{PEERS}; {every_name}"),
            "gradxform --help": ("-c", cli, "--help"),
            "gradxform --version": ("-c", cli, "--version"),
            "gradxform run, config error": ("-c", cli, "run", str(config)),
        }
        calls = {name: functools.partial(start, *args) for name, args in commands.items()}
        times = turns(calls, RUNS, warm_up=0)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        print(f"{name:30}{value:6.2f} s")
    base, package, whole, *answers = median.values()
    print(f"\nimport gradxform adds {package - base:.3f} s (at most 0.1)")
    print(f"first use of every name then adds {whole - package:.3f} s")
    print(f"slowest answer {max(answers):.2f} s (under 1)")
    return int(package - base > 0.1 or max(answers) >= 1)


if __name__ == "__main__":
    sys.exit(main())
