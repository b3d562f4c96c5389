"""Configs: what is accepted, and how every kind of mistake is reported."""

import inspect
import subprocess
import sys
import time
import tomllib
import typing
from dataclasses import fields

import pytest

from gradxform.lab.experiment import catalogue, methods, toml
from gradxform.lab.experiment import load as lab_config
from gradxform.lab.experiment.load import (
    ConfigError,
    find_config,
    load_config,
    parse_config,
    shipped_configs,
    sweep_members,
    task_choices,
    to_toml,
)
from gradxform.lab.experiment.signatures import interval, public_names, signature


def table(**changes):
    """A valid experiment, with sections replaced."""
    base = {
        "name": "trial",
        "task": {"kind": "classification", "dataset": "digits", "model": "keras_mlp"},
        "training": {"epochs": 2, "batch_size": 32},
        "optimizers": {"sgd": {"method": "sgd", "learning_rate": 0.1}},
    }
    return base | changes


def with_optimizer(**entry):
    return table(optimizers={"x": entry})


def problems(experiment):
    with pytest.raises(ConfigError) as caught:
        parse_config(experiment)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_are_filled_in():
    config = parse_config(table())
    assert (config.seed, config.title, config.output.folder) == (0, "", "runs")
    assert (config.task.validation_split, config.task.l1, config.task.l2) == (0.0, 0.0, 0.0)
    assert (config.training.batch_size, config.training.order) == (32, "reshuffle")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(table()).seed = 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nam": "x"}, "nam: unknown key, did you mean 'name'?"),
        ({"name": "a/b"}, "name: should be made of letters, digits"),
        ({"seed": -1}, "seed: should be greater than or equal to 0, found -1"),
        ({"seed": 1.5}, "seed: should be a valid whole number, found 1.5"),
        ({"seed": True}, "seed: should be a valid whole number, found True"),
        ({"training": {}}, "training.epochs: missing, for instance epochs = 10"),
        ({"training": 3}, "training: should be a table, found 3"),
        (
            {"training": {"epochs": 1, "epoch": 3}},
            "training.epoch: unknown key, did you mean 'epochs'?",
        ),
        (
            {"training": {"epochs": 1, "zzz": 3}},
            "training.zzz: unknown key; the keys here are epochs, batch_size, order, ",
        ),
        (
            {"training": {"epochs": 1, "steps": 3}},
            "training.steps: unknown key; the keys here are epochs, batch_size, order, ",
        ),
        (
            {"training": {"epochs": 1, "batch_size": 0}},
            'training.batch_size: should be a whole number from 1 to 1000000, or "full", found 0',
        ),
        (
            {"training": {"epochs": 1, "order": "reshufle"}},
            "training.order: should be 'reshuffle', 'shuffle_once', 'sequential' or 'online', "
            "found 'reshufle', did you mean 'reshuffle'?",
        ),
        (
            {"training": {"epochs": 1, "max_seconds": 0}},
            "training.max_seconds: should be greater than 0, found 0",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"sdg": {"epochs": 2}}}},
            "training.overrides.sdg: no optimiser has this label, did you mean 'sgd'?",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"zzz": {}}}},
            "training.overrides.zzz: no optimiser has this label; the labels are sgd",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"sgd": 3}}},
            "training.overrides.sgd: should be a table, found 3",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"sgd": {"epoch": 2}}}},
            "training.overrides.sgd.epoch: unknown key, did you mean 'epochs'?",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"sgd": {"order": "sequentia"}}}},
            "training.overrides.sgd.order: should be 'reshuffle', 'shuffle_once', 'sequential' or "
            "'online', found 'sequentia', did you mean 'sequential'?",
        ),
        (
            {"training": {"epochs": 1, "overrides": {"sgd": {"batch_size": 0}}}},
            "training.overrides.sgd.batch_size: should be a whole number from 1 to 1000000, ",
        ),
        ({"optimizers": {}}, "optimizers: needs an entry"),
        ({"optimizers": {"x": 3}}, "optimizers.x: should be a table, found 3"),
        ({"output": {"foldr": "x"}}, "output.foldr: unknown key, did you mean 'folder'?"),
        (
            {"task": {}},
            "task.kind: should be 'classification', 'regression', 'autoencoder', 'language', "
            "'physics', 'curve_fit' or 'surface', but is",
        ),
        (
            {"task": {"kind": "clasification"}},
            "task.kind: should be 'classification', 'regression', 'autoencoder', 'language', "
            "'physics', 'curve_fit' or 'surface', found 'clasification', "
            "did you mean 'classification'?",
        ),
        ({"task": ["classification"]}, "task: should be a table"),
    ],
)
def test_each_mistake_in_plain_keys_is_named(changes, expected):
    found = problems(table(**changes))
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "mnis"}, "task.dataset: should be 'digits', 'mnist', "),
        ({"model": "autoencoder"}, "task.model: should be 'keras_mlp', 'logistic', 'mlp' or 'cnn'"),
        ({"validation_split": 1.0}, "task.validation_split: should be less than 1, found 1.0"),
        ({"validation_split": float("nan")}, "task.validation_split: should be a finite number"),
        ({"l2": "much"}, "task.l2: should be a valid number, found 'much'"),
        (
            {"model_options": {"hiden": 3}},
            "task.model_options.hiden: unknown option of keras_mlp, did you mean 'hidden'?",
        ),
        (
            {"model_options": {"hidden": 0}},
            "task.model_options.hidden: should be a whole number from 1 to 100000, found 0",
        ),
        (
            {"model": "logistic", "model_options": {"hidden": 3}},
            "task.model_options.hidden: unknown option of logistic; it has none",
        ),
        ({"model_options": 3}, "task.model_options: should be a table, found 3"),
    ],
)
def test_each_mistake_in_a_task_is_named(changes, expected):
    found = problems(table(task=table()["task"] | changes))
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, 'optimizers.x: needs either method = "NAME" or chain ='),
        ({"method": 3}, "optimizers.x.method: should be a name, found 3"),
        (
            {"method": "adm"},
            "optimizers.x.method: no method named 'adm' in gradxform, optax or optax.contrib, "
            "did you mean 'adam'?",
        ),
        ({"method": "optax.adm"}, "optimizers.x.method: no method named 'optax.adm' in"),
        ({"method": "adamw"}, "optimizers.x.method: no method named 'adamw' in"),
        (
            {"method": "adam", "learning_rat": 0.1},
            "optimizers.x.learning_rat: unknown argument of gradxform.adam, "
            "did you mean 'learning_rate'?",
        ),
        (
            {"method": "sgd", "zzz": 1, "learning_rate": 1},
            "optimizers.x.zzz: unknown argument of gradxform.sgd; it takes learning_rate",
        ),
        (
            {"method": "sgd"},
            "optimizers.x.learning_rate: missing: gradxform.sgd needs it (a number or a schedule",
        ),
        (
            {"method": "sgd", "learning_rate": "fast"},
            "optimizers.x.learning_rate: should be a number or a schedule",
        ),
        (
            {"method": "adam", "b1": True},
            "optimizers.x.b1: should be a number, found True",
        ),
        (
            {"method": "adam", "b1": {"schedule": "linear_decay"}},
            "optimizers.x.b1: should be a number, found {",
        ),
        (
            {"method": "coordinate_descent", "order": "cyclc"},
            "optimizers.x.order: should be 'cyclic', 'random' or 'greedy', found 'cyclc', "
            "did you mean 'cyclic'?",
        ),
        (
            {"method": "sgd", "learning_rate": {"schedule": "linear_decy"}},
            "optimizers.x.learning_rate.schedule: no schedule named 'linear_decy' in gradxform, "
            "optax or optax.contrib, did you mean 'linear_decay'?",
        ),
        (
            {"method": "sgd", "learning_rate": {"schedule": "linear_decay", "init_value": 1}},
            "optimizers.x.learning_rate.end_value: missing: gradxform.linear_decay needs it",
        ),
        (
            {"method": "polyak_average", "tx": {"method": "sgd"}},
            "optimizers.x.tx.learning_rate: missing",
        ),
        ({"method": "polyak_average", "tx": 3}, "optimizers.x.tx: should be a table {method"),
        (
            {"chain": [{"method": "optax.clip", "max_delt": 1.0}]},
            "optimizers.x.chain[0].max_delt: unknown argument of optax.clip, "
            "did you mean 'max_delta'?",
        ),
        ({"chain": [3]}, "optimizers.x.chain[0]: should be a table {method"),
        ({"chain": []}, "optimizers.x.chain: should be a list of links, found []"),
        (
            {"chain": [{"method": "sgd", "learning_rate": 1.0}], "lr": 3},
            "optimizers.x.lr: a chain takes no arguments",
        ),
        (
            {"method": "newton_cg", "curvature": "gaus_newton"},
            "optimizers.x.curvature: should be 'gauss_newton' or 'hessian', found 'gaus_newton', "
            "did you mean 'gauss_newton'?",
        ),
        (
            {"method": "newton_cg", "curvature": {"curvature": "hessian"}},
            "optimizers.x.curvature: should be 'gauss_newton' or 'hessian', found {",
        ),
        (
            {"method": "newton_cg", "preconditioner": "nystrom"},
            'optimizers.x.preconditioner: should be a table {preconditioner = "NAME", ...}, found',
        ),
        (
            {"method": "newton_cg", "preconditioner": {"method": "nystrom"}},
            'optimizers.x.preconditioner: should be a table {preconditioner = "NAME", ...}, found',
        ),
        (
            {"method": "newton_cg", "preconditioner": {"preconditioner": "nystrm"}},
            "optimizers.x.preconditioner.preconditioner: no preconditioner named 'nystrm' in "
            "gradxform, optax or optax.contrib, did you mean 'nystrom'?",
        ),
        (
            {"method": "newton_cg", "preconditioner": {"preconditioner": "adam"}},
            "optimizers.x.preconditioner.preconditioner: no preconditioner named 'adam'",
        ),
        (
            {"method": "newton_cg", "preconditioner": {"preconditioner": "nystrom", "rnk": 3}},
            "optimizers.x.preconditioner.rnk: unknown argument of gradxform.nystrom, did you mean "
            "'rank'?",
        ),
        (
            {"method": "with_line_search", "direction": {"method": "scale_by_newton_cg", "tl": 1}},
            "optimizers.x.direction.tl: unknown argument of gradxform.scale_by_newton_cg",
        ),
        ({"method": "optax.chain"}, "optimizers.x.method: optax.chain: write chain = [...]"),
    ],
)
def test_each_mistake_in_an_optimizer_is_named(entry, expected):
    found = problems(with_optimizer(**entry))
    assert any(problem.startswith(expected) for problem in found), found


def test_the_same_name_elsewhere_is_suggested():
    (found,) = problems(with_optimizer(method="adamw"))
    assert found.endswith("did you mean 'optax.adamw'?")


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "optax.apply_updates",  # public, but no transformation
        "optax.GradientTransformation",
        "optax.transforms.clip",
        "optax._src.alias.adam",
        "gradxform.lab.cli.main",
        "gradxform.minimize",
        "gradxform.__init__",
        "",
        ".adam",
    ],
)
def test_only_public_methods_can_be_named(name):
    assert any("no method named" in problem for problem in problems(with_optimizer(method=name)))


def test_all_problems_come_at_once_one_a_line():
    broken = table(seed=-1, nam=1, training={"epochs": 0}, optimizers={"a": {"method": "adm"}})
    with pytest.raises(ConfigError) as caught:
        parse_config(broken, "mine.toml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "mine.toml:"
    paths = {line.split(":")[0].strip() for line in lines[1:]}
    assert paths == {"seed", "nam", "training.epochs", "optimizers.a.method"}


def test_toml_syntax_errors_have_a_place(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text('name = "x"\nseed = = 3\n')
    with pytest.raises(ConfigError, match=r"(?s)broken\.toml.*line 2, column 8"):
        load_config(file)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)


def test_a_missing_file_suggests_a_shipped_config():
    with pytest.raises(ConfigError, match=r"no such file.*did you mean 'digits_race'"):
        find_config("digit_race")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        find_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.epochs=7", "training", "epochs", 7),
        ("training.order=sequential", "training", "order", "sequential"),
        ('training.order="sequential"', "training", "order", "sequential"),
        ("training.batch_size=full", "training", "batch_size", "full"),
        ("task.l2 = 1e-4", "task", "l2", 1e-4),
        ("task.model_options={}", "task", "model_options", {}),
        ("task.model_options.hidden=8", "task", "model_options", {"hidden": 8}),
        ("output.folder=elsewhere", "output", "folder", "elsewhere"),
    ],
)
def test_overrides(override, section, key, value):
    config = load_config("keras_mnist", [override])
    assert getattr(getattr(config, section), key) == value


def test_overrides_reach_into_optimizers():
    config = load_config(
        "keras_mnist",
        [
            "optimizers.sgd.learning_rate=0.5",
            'optimizers."a b"={method="adam"}',
            'optimizers.c={chain=[{method="optax.clip", max_delta=1}, {method="adam"}]}',
            "optimizers.c.chain.0.max_delta=2.0",
        ],
    )
    assert config.optimizers["sgd"]["learning_rate"] == 0.5
    assert config.optimizers["a b"] == {"method": "adam"}
    assert config.optimizers["c"]["chain"][0]["max_delta"] == 2.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "--set: should be key=value with a dotted key, found 'epochs'"),
        ("=3", "--set: should be key=value"),
        ("a b=3", "--set: should be key=value"),
        ("training.epochs=many", "training.epochs: should be a valid whole number, found 'many'"),
        ("training.epochs=1\nseed=3", "training.epochs: should be a valid whole number"),
        ("training.epoch=3", "training.epoch: unknown key, did you mean 'epochs'?"),
        ("optimizers.SGD.lr=1", "--set optimizers.SGD.lr: there is no 'SGD', did you mean 'sgd'?"),
        ("name.x=3", "--set name.x: name is not a table in this config"),
        ("name.x.y=3", "--set name.x.y: name is not a table in this config"),
        ("optimizers.sgd.lr=1", "optimizers.sgd.lr: unknown argument of gradxform.sgd"),
    ],
)
def test_overrides_are_checked_like_the_file(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("keras_mnist", [override])
    assert any(str(p).startswith(expected) for p in caught.value.problems), caught.value.problems


def test_an_override_of_a_missing_link_is_refused():
    chain = 'optimizers.sgd={chain=[{method="sgd", learning_rate=1}]}'
    with pytest.raises(ConfigError, match=r"optimizers\.sgd\.chain has no item '4'"):
        load_config("keras_mnist", [chain, "optimizers.sgd.chain.4=1"])


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_shipped_configs_load_and_say_what_they_are(name):
    config = load_config(name)
    assert config.name == name
    assert config.title


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_the_written_config_is_the_same_config(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


def test_awkward_values_survive_writing():
    text = 'quote " slash \\ line\nbreak tab\t DEL\x7f ε'
    chain = [{"method": "optax.clip", "max_delta": 1e-7}, {"method": "adam", "b1": 0.5}]
    schedule = {
        "schedule": "optax.piecewise_constant_schedule",
        "init_value": 1.0,
        "boundaries_and_scales": {"10": 0.1},
    }
    entries = {
        "a.b": {"method": "sgd", "learning_rate": schedule},
        'c "d"': {"chain": chain},
        "e": {"method": "optax.rmsprop", "learning_rate": float("inf"), "nesterov": True},
    }
    overrides = {label: {"epochs": 3, "max_seconds": 0.5} for label in entries}
    training = {"epochs": 2, "overrides": overrides}
    config = parse_config(table(title=text, optimizers=entries, training=training))
    assert parse_config(tomllib.loads(to_toml(config))) == config


def test_surface_configs_have_their_own_keys():
    surface = {"kind": "surface", "surface": "rosenbrock", "start": [-1, 2.0]}
    config = parse_config(table(task=surface, training={"steps": 5}))
    assert config.task.start == (-1.0, 2.0)
    assert config.training.steps == 5
    found = problems(table(task=surface | {"start": [1]}, training={"epochs": 5}))
    assert any(p.startswith("task.start: should be a pair of numbers") for p in found)
    assert any(p.startswith("training.steps: missing") for p in found)
    assert any(p.startswith("training.epochs: unknown key") for p in found)


def test_checking_does_not_import_jax(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(
        '[task]\nkind = "surface"\n[training]\nstep = 3\n'
        '[optimizers.a]\nmethod = "optax.adamw"\n[optimizers.b]\nmethod = "adam"\nb1 = 2\n'
    )
    code = (
        "import sys\n"
        "from gradxform.lab.experiment.load import ConfigError, load_config\n"
        "try: load_config(sys.argv[1])\n"
        "except ConfigError as error: print(len(error.problems))\n"
        "print({'jax', 'optax', 'flax', 'matplotlib', 'sklearn'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["6", "set()"], done.stdout


def test_the_choices_are_those_of_the_lab():
    from gradxform.lab.data.sets import DATASETS
    from gradxform.lab.tasks.curves import CURVES
    from gradxform.lab.tasks.models import MODELS
    from gradxform.lab.tasks.surfaces import SURFACES
    from gradxform.lab.training.batching import ORDERS

    choices = task_choices()
    assert choices["classification"]["dataset"] == choices["autoencoder"]["dataset"]
    data = ("classification", "dataset"), ("language", "dataset"), ("physics", "equation")
    assert sum((choices[kind][key] for kind, key in data), ()) == DATASETS
    assert choices["surface"]["surface"] == tuple(SURFACES)
    curves = choices.pop("curve_fit")["model"]
    assert curves == tuple(CURVES)
    models = [model for kind in choices.values() for model in kind.get("model", ())]
    assert set(models) == set(MODELS)
    order = lab_config.Training.model_fields["order"].annotation
    assert typing.get_args(order) == ORDERS


def test_a_language_task_has_all_defaults():
    config = parse_config(table(task={"kind": "language"}))
    assert (config.task.dataset, config.task.model) == ("synthetic_text", "transformer")
    assert parse_config(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "mnist"}, "task.dataset: should be 'synthetic_text', found 'mnist'"),
        ({"model": "mlp"}, "task.model: should be 'transformer', found 'mlp'"),
        ({"loss": "squared"}, "task.loss: unknown key"),
        (
            {"model_options": {"head": 2}},
            "task.model_options.head: unknown option of transformer, did you mean 'heads'?",
        ),
        (
            {"model_options": {"layers": 0}},
            "task.model_options.layers: should be a whole number from 1 to 100000, found 0",
        ),
    ],
)
def test_each_mistake_in_a_language_task_is_named(changes, expected):
    (found,) = problems(table(task={"kind": "language"} | changes))
    assert found.startswith(expected)


def test_the_model_options_are_those_of_the_models():
    from gradxform.lab.tasks.models import MODELS

    linen = {"parent", "name", "num_classes"}
    options = {name: {f.name for f in fields(model)} - linen for name, model in MODELS.items()}
    assert {name: set(table) for name, table in lab_config._MODEL_OPTIONS.items()} == options


# What the source says must be what Python says, or a config would be refused or waved through.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("package", catalogue.PACKAGES)
def test_signatures_read_from_source_are_the_real_ones(package):
    module = __import__(package, fromlist=["_"])
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    seen = 0
    for name in public_names(package):
        read, real = signature(package, name), getattr(module, name, None)
        if read is None or not inspect.isfunction(real):
            continue
        parameters = inspect.signature(real).parameters.values()
        expected = {p.name: p.default is p.empty for p in parameters if p.kind in named}
        assert {k: a.required for k, a in read.arguments.items()} == expected, name
        seen += 1
    assert seen >= 15


@pytest.mark.parametrize("package", catalogue.PACKAGES)
def test_every_method_that_needs_no_arguments_is_a_transformation(package):
    import optax

    for method in catalogue.methods(package):
        if any(a.required for a in method.arguments.values()) or "dpsgd" in method.name:
            continue
        tx = methods.build({"method": method.name}, "optimizers.x")
        assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_all_of_gradxforms_methods_can_be_named():
    named = {m.name for m in catalogue.methods("gradxform")}
    expected = "sgd momentum nesterov delta_bar_delta adagrad adadelta rmsprop adam"
    assert {f"gradxform.{name}" for name in expected.split()} <= named
    schedules = {m.name for m in catalogue.methods("gradxform", "schedule")}
    assert {"gradxform.linear_decay", "gradxform.inverse_time_decay"} <= schedules


def test_build_gives_what_the_table_says():
    import jax.numpy as jnp

    schedule = {
        "schedule": "optax.piecewise_constant_schedule",
        "init_value": 1.0,
        "boundaries_and_scales": {"1": 0.5},
    }
    links = [{"method": "optax.scale", "step_size": 3.0}, {"method": "sgd"}]
    links[1]["learning_rate"] = schedule
    tx = methods.build({"chain": links}, "optimizers.x")
    state = tx.init(jnp.zeros(()))
    first, state = tx.update(jnp.ones(()), state)
    second, _ = tx.update(jnp.ones(()), state)
    assert (float(first), float(second)) == (-3.0, -1.5)


def test_build_gives_curvatures_preconditioners_and_directions():
    import jax
    import jax.numpy as jnp

    import gradxform as gx

    value_fn = gx.compose(lambda y: jnp.sum(y**2), lambda x: jnp.sinh(x) + x[::-1])
    point = jnp.asarray([1.0, 2.0])

    def step(tx):
        value, grads = jax.value_and_grad(value_fn)(point)
        return tx.update(grads, tx.init(point), point, value=value, grad=grads, value_fn=value_fn)[
            0
        ]

    made = {"preconditioner": "hutchinson_diagonal", "samples": 4, "seed": 3}
    for table, options in [
        ({"curvature": "gauss_newton"}, {"curvature": gx.gauss_newton()}),
        ({"curvature": "hessian"}, {}),
        (
            {"preconditioner": made, "tol": 0.5},
            {"preconditioner": gx.hutchinson_diagonal(4, seed=3), "tol": 0.5},
        ),
    ]:
        entry = {"method": "scale_by_newton_cg", "tol": 0.0, **table}
        expected = gx.scale_by_newton_cg(**{"tol": 0.0, **options})
        search = {"method": "with_line_search", "direction": entry}
        parse_config(with_optimizer(**search))
        for built, direct in [(entry, expected), (search, gx.with_line_search(expected))]:
            given = step(methods.build(built, "optimizers.x"))
            assert given.tolist() == step(direct).tolist()


def test_build_says_where_a_value_is_refused():
    averaged = {"method": "polyak_average", "tx": {"method": "sgd", "learning_rate": -1.0}}
    with pytest.raises(ConfigError, match=r"optimizers\.x\.tx\.learning_rate: sgd.*learning_rate"):
        methods.build(averaged, "optimizers.x")


NUMBERS = [
    (function, name)
    for kind in ("method", "schedule", "preconditioner")
    for function in catalogue.methods("gradxform", kind)
    for name, argument in function.arguments.items()
    if {"a number", "a whole number"} & set(catalogue.admitted(argument.annotation) or ())
]
NEEDED = {"learning_rate": 0.1, "init_value": 1.0, "end_value": 0.1, "transition_steps": 5}
NEEDED |= {"decay": 0.5, "tx": {"method": "sgd", "learning_rate": 0.1}}
NEEDED |= {"direction": {"method": "sgd", "learning_rate": 0.1}}


@pytest.mark.parametrize(("function", "name"), NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_intervals_are_those_that_the_functions_check(function, name):
    kind = next(kind for kind, types in catalogue.RETURNS.items() if function.returns in types)
    required = {key: NEEDED[key] for key, a in function.arguments.items() if a.required}
    short = function.name.rpartition(".")[2]
    low, high = interval(function.arguments[name].annotation)
    whole = name in ("memory_size",)
    for value, good in [(low, True), (low - 1, False), (high, False)]:
        value = int(value) if whole and value < float("inf") else value
        entry = {kind: short} | required | {name: value}
        if kind == "schedule":
            outer = {"method": "sgd", "learning_rate": entry}
            path = f"optimizers.x.learning_rate.{name}"
        elif kind == "preconditioner":
            outer = {"method": "newton_cg", "preconditioner": entry}
            path = f"optimizers.x.preconditioner.{name}"
        else:
            outer, path = entry, f"optimizers.x.{name}"
        if good:
            parse_config(with_optimizer(**outer))
            methods.build(outer, "optimizers.x")
        else:
            assert [p.split(":")[0] for p in problems(with_optimizer(**outer))] == [path]
            with pytest.raises(ConfigError) as caught:
                methods.build(outer, "optimizers.x")
            assert [problem.path for problem in caught.value.problems] == [path]


def test_all_bad_numbers_come_with_the_other_problems():
    adam = {"method": "adam", "b1": 2, "b2": float("nan"), "learning_rate": -1}
    found = problems(table(seed=-1, optimizers={"a": adam, "b": {"chain": [adam]}}))
    paths = [f"{path}.{key}" for path in ("optimizers.a", "optimizers.b.chain[0]") for key in adam]
    assert {p.split(": ")[0] for p in found} == {"seed", *paths} - {
        "optimizers.a.method",
        "optimizers.b.chain[0].method",
    }


def test_keys_of_boundaries_should_be_whole_numbers():
    for key in ("\u00b2", "ten", "1.5"):
        schedule = {
            "schedule": "optax.piecewise_constant_schedule",
            "init_value": 1.0,
            "boundaries_and_scales": {key: 0.5},
        }
        (found,) = problems(with_optimizer(method="sgd", learning_rate=schedule))
        path = f"optimizers.x.learning_rate.boundaries_and_scales.{key}"
        assert found.startswith(f"{path}: the keys here should be whole numbers")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"training": {"epochs": 10**9}}, "training.epochs"),
        ({"training": {"epochs": 1, "batch_size": 10**9}}, "training.batch_size"),
        (
            {"task": table()["task"] | {"model_options": {"hidden": 10**9}}},
            "task.model_options.hidden",
        ),
        (
            {
                "task": {"kind": "surface", "surface": "beale", "start": [10**400, 0]},
                "training": {"steps": 10**9},
            },
            "task.start training.steps",
        ),
    ],
)
def test_sizes_beyond_any_machine_are_refused(changes, path):
    assert [p.split(": ")[0] for p in problems(table(**changes))] == path.split()


@pytest.mark.parametrize("start", [[1, float("nan")], [float("nan"), 1], [1, float("inf")]])
def test_a_start_is_finite(start):
    task = {"kind": "surface", "surface": "beale", "start": start}
    (found,) = problems(table(task=task, training={"steps": 1}))
    assert found.startswith("task.start: should be a pair of numbers")


@pytest.mark.parametrize("kind", ["surfce", "xyzzy", None, ["surface"]])
def test_a_misspelt_kind_is_the_only_problem(kind):
    task = {"surface": "rosenbrock"} | ({} if kind is None else {"kind": kind})
    (found,) = problems(table(task=task, training={"steps": 3}))
    assert found.startswith("task.kind: should be 'classification', 'regression', 'autoencoder', ")


def test_the_rest_is_checked_as_for_the_kind_that_is_meant():
    found = problems(table(task={"kind": "surfac", "surface": "rosenbrok"}, training={"steps": 0}))
    assert [p.split(": ")[0] for p in found] == ["task.kind", "task.surface", "training.steps"]


# -- the sweep's table

RATES = {"learning_rate": {"log": [1e-3, 1.0], "points": 4}}


def test_a_sweep_has_defaults_and_survives_writing():
    sweep = {"axes": RATES, "overrides": {"sgd": {"learning_rate": [0.5, 0.1]}}}
    config = parse_config(table(sweep=sweep))
    assert (config.sweep.seeds, config.sweep.vary) == (1, "initialisation")
    assert (config.sweep.rungs, config.sweep.keep) == ((), 0.5)
    assert parse_config(tomllib.loads(to_toml(config))) == config
    assert [member.values["learning_rate"] for member in sweep_members(config)] == [0.5, 0.1]


def test_awkward_axes_survive_writing():
    decay = {"schedule": "linear_decay", "init_value": 1.0, "end_value": 0.1, "transition_steps": 9}
    chain = [{"method": "optax.clip", "max_delta": 1.0}, {"method": "sgd", "learning_rate": decay}]
    label = 'a.b "c"'
    axes = {"chain": {"1": {"learning_rate": {"init_value": [1, 0.5]}}}}
    sweep = {"seeds": 2, "rungs": [1], "overrides": {label: axes}}
    config = parse_config(table(optimizers={label: {"chain": chain}}, sweep=sweep))
    assert parse_config(tomllib.loads(to_toml(config))) == config
    assert len(sweep_members(config)) == 4


def test_the_members_of_a_surface_are_starts():
    surface = {"kind": "surface", "surface": "rosenbrock"}
    options = {"task": surface, "training": {"steps": 5}}
    config = parse_config(table(**options, sweep={"starts": {"points": 3}}))
    assert [member.seed for member in sweep_members(config)] == list(range(9))
    assert parse_config(tomllib.loads(to_toml(config))) == config
    config = parse_config(table(**options, sweep={"starts": [[1, 2], [0.5, 0.5]]}))
    assert config.sweep.starts == ((1.0, 2.0), (0.5, 0.5))
    assert parse_config(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"seed": 2, "axes": RATES}, "sweep.seed: unknown key, did you mean 'seeds'?"),
        ({"seeds": 0, "axes": RATES}, "sweep.seeds: should be greater than or equal to 1, found 0"),
        ({"vary": "orders", "axes": RATES}, "did you mean 'order'?"),
        ({"rungs": [2, 1], "axes": RATES}, "sweep.rungs: should be a list of epochs, each after"),
        ({"rungs": [0], "axes": RATES}, "sweep.rungs: should be a list of epochs"),
        ({"rungs": 1, "axes": RATES}, "sweep.rungs: should be a list of epochs"),
        (
            {"rungs": [1, 2], "axes": RATES},
            "sweep.rungs: should be before the last epoch, 2, found 2",
        ),
        ({"keep": 1.0, "axes": RATES}, "sweep.keep: should be less than 1, found 1.0"),
        ({"keep": 0.0, "axes": RATES}, "sweep.keep: should be greater than 0, found 0.0"),
        ({"block_size": 0, "axes": RATES}, "sweep.block_size: should be greater than or equal"),
        ({"starts": {"points": 3}}, "sweep.starts: unknown key"),
        ({"axes": {"learning_rat": [0.1]}}, "did you mean 'learning_rate'?"),
        ({"axes": {"learning_rate": []}}, "sweep.axes.learning_rate: should be a list of numbers"),
        ({"axes": {"learning_rate": [-0.1]}}, "should be at least 0 and finite, found -0.1"),
        ({"axes": 3}, "sweep.axes: should be a table, found 3"),
        ({"overrides": {"sdg": RATES}}, "sweep.overrides.sdg: no optimiser has this label"),
        ({}, "sweep: nothing to sweep: needs an axis, as in [sweep.axes] with"),
        ({"samples": 3, "seeds": 2}, "sweep.samples: random points need an axis in [sweep.axes]"),
        ({"samples": 3, "axes": RATES}, "points are for a grid: leave them out"),
        ({"seeds": 10**6, "axes": RATES}, "sweep: makes 4000000 runs, more than 1000000"),
    ],
)
def test_each_mistake_in_a_sweep_is_named(sweep, expected):
    (problem,) = problems(table(sweep=sweep))
    assert expected in problem


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({}, "sweep: nothing to sweep: needs an axis"),
        ({"starts": {"points": 1}}, "sweep.starts: should be {points = 21}, with 2 to 1000 a side"),
        ({"starts": []}, "sweep.starts: should be {points = 21}"),
        ({"starts": [[1.0, 2.0, 3.0]]}, "sweep.starts: should be a pair of numbers"),
        ({"starts": [[1.0, 2.0]], "tol": 0.0}, "sweep.tol: should be greater than 0, found 0.0"),
        ({"seeds": 3}, "sweep.seeds: unknown key"),
    ],
)
def test_each_mistake_in_a_sweep_of_a_surface_is_named(sweep, expected):
    surface = {"kind": "surface", "surface": "rosenbrock"}
    (problem,) = problems(table(task=surface, training={"steps": 5}, sweep=sweep))
    assert expected in problem


def test_mistakes_in_a_sweep_come_with_the_others():
    found = problems(
        table(
            optimizers={"sgd": {"method": "sgd"}},
            training={"epoch": 2},
            sweep={"kep": 0.5, "axes": {"learning_rat": [0.1], "momentum": [0.1]}},
        )
    )
    paths = {problem.partition(":")[0] for problem in found}
    assert {"optimizers.sgd.learning_rate", "training.epochs", "sweep.kep"} <= paths


DOTTED = "a." * 100_000 + "a = 1"
SAFE = (
    *("x = 1.5", "x = [" + "1.5, " * 9999 + "2]", 'x = "' + "a." * 9999 + '"', "# " + DOTTED),
    *(f'x = """\n{DOTTED}\n"""', f"x = '''\n{DOTTED}\n'''", 'x = """a"b""""\ny = "c"'),
)


@pytest.mark.parametrize("text", SAFE)
def test_dots_that_are_in_no_key_do_no_harm(text):
    assert toml.parse(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "before",
    [
        *("", "[", "x = {", "# it's\n", 'x = """a"b""""\n', "x = '''a'b'''\n", 'x = "\\""\n'),
        *('x = """\\""""\n', "x = '\\'\n", 'x = ["""\n"""]\n', 'x = [1,\n2] # """\n'),
    ],
)
@pytest.mark.parametrize("part", ["a.", '"=".', "'#' . ", '"\\"".'])
def test_a_key_of_many_parts_is_refused_at_once(before, part):
    started = time.process_time()
    with pytest.raises(tomllib.TOMLDecodeError, match="a dotted key of more than 1000 parts"):
        toml.parse(before + part * 50_000 + "a = 1")
    assert time.process_time() - started < 5


def test_of_many_problems_some_are_shown():
    found = ConfigError("x", [f"problem {i}" for i in range(1000)])
    assert len(found.problems) == 1000
    assert str(found).splitlines()[-1] == "  and 900 more"


def test_a_written_sweep_draws_the_same_random_points():
    axes = {"learning_rate": {"log": [1e-4, 1.0]}, "momentum": [0.5, 0.9]}
    shipped = tomllib.loads((lab_config.shipped_configs()["digits_race"]).read_text())
    config = lab_config.parse_config({**shipped, "sweep": {"axes": axes, "samples": 3}})
    again = lab_config.parse_config(tomllib.loads(lab_config.to_toml(config)))
    assert lab_config.sweep_members(again) == lab_config.sweep_members(config)
