"""What ``gradxform list`` prints: everything that a config can name."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradxform.lab.experiment.catalogue import PACKAGES, curvatures, methods
from gradxform.lab.experiment.registry import find, named

#: How long each shipped config takes on two CPU cores, by its own command.
TIMES = {
    "adam_paper_cnn": "2 min",
    "adam_paper_mlp": "2 min",
    "adam_paper_mlp_deterministic": "2 min",
    "batch_size": "25 s",
    "burgers": "7 min",
    "curve_fit": "5 s",
    "deep_autoencoder": "14 min",
    "digits_race": "20 s",
    "digits_second_order": "1 min",
    "keras_mnist": "10 s",
    "keras_time_decay": "15 s",
    "learning_rate": "20 s",
    "mnist_full_batch": "4 min",
    "mnist_race": "30 s",
    "mnist_second_order": "4 min",
    "schedules": "15 s",
    "surfaces": "25 s",
    "transformer": "10 min",
    "valley": "10 s",
    "valley_second_order": "10 s",
}


def list_methods() -> None:
    """The methods, schedules, curvatures and preconditioners that a config can name."""
    title = "Methods; arguments in [brackets] are optional"
    table = Table("method", "arguments", "description", title=escape(title), title_justify="left")
    own = (found.signature for name in named("method") if (found := find("method", name)))
    for method in (*methods("gradxform"), *own):
        arguments = ", ".join(
            name if argument.required else f"[{name}]"
            for name, argument in method.arguments.items()
        )
        table.add_row(
            method.name.removeprefix("gradxform."), escape(arguments), escape(method.summary)
        )
    _print(table)
    for package in PACKAGES[1:]:
        names = ", ".join(m.name for m in methods(package))
        _print(f"\nFrom {package}: {names}")
    schedules = ", ".join(
        m.name.removeprefix("gradxform.")
        for package in PACKAGES
        for m in methods(package, "schedule")
    )
    _print(f'\nSchedules for a learning rate, as {{schedule = "NAME", ...}}: {schedules}')
    preconditioners = ", ".join(
        m.name.removeprefix("gradxform.") for m in methods("gradxform", "preconditioner")
    )
    _print(f'\nCurvatures, as curvature = "NAME": {", ".join(curvatures())}')
    _print(f'\nPreconditioners, as {{preconditioner = "NAME", ...}}: {preconditioners}')


def list_tasks() -> None:
    """The kinds of task, and the choices for each."""
    from gradxform.lab.experiment import load as config

    table = Table("task.kind", "choices", title="Tasks", title_justify="left")
    for kind, choices in config.task_choices().items():
        lines = (f"{key}: {', '.join(values)}" for key, values in choices.items())
        own = find("task", kind)
        keys = ", ".join(own.signature.arguments) if own else ""
        table.add_row(kind, "\n".join(lines) or (keys and f"keys: {keys}"))
    _print(table)
    if loggers := named("logger"):
        _print(f"\nLoggers, as --log NAME: {', '.join(loggers)}")


def list_configs() -> None:
    """The configs that come with the package."""
    from gradxform.lab.experiment.load import load_config, shipped_configs

    title = "Configs, and how long they take on two CPU cores"
    table = Table("config", "time", "title", title=title, title_justify="left")
    for name in shipped_configs():
        table.add_row(name, TIMES[name], escape(load_config(name).title))
    _print(table)


def _print(what: Any) -> None:
    Console().print(what, highlight=False)
