"""A step of every method of the table, without pytest: does this interpreter and JAX work?"""

import sys
from pathlib import Path

import jax

import gradxform as gx

sys.path.append(str(Path(__file__).parents[1]))  # after the gradxform that is installed

from tests.methods import METHODS, nested_params, objective, step


def main() -> None:
    for name, method in METHODS.items():
        tx, params = method.build(), nested_params()
        after, state = jax.jit(lambda p, s, tx=tx: step(tx, p, s))(params, tx.init(params))
        before, now = objective(params), objective(gx.eval_params(state, after))
        if not now <= before:
            sys.exit(f"{name}: one step raised the objective from {before} to {now}")
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"{len(METHODS)} methods stepped on Python {python}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
