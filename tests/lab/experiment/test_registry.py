"""The user's own names: how they are registered, found and refused."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gradxform.lab as lab
from gradxform.lab.cli import app
from gradxform.lab.data.sets import DATASETS
from gradxform.lab.experiment import catalogue, methods, own_files, registry
from gradxform.lab.experiment.kinds import KINDS
from gradxform.lab.experiment.load import parse_config, task_choices, to_toml
from gradxform.lab.experiment.own_files import OwnFileError
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.tasks.models import MODELS
from gradxform.lab.tasks.surfaces import SURFACES


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    registry.forget()
    own_files.load([])


def written(folder: Path, text: str, name: str = "mylab.py") -> Path:
    file = folder / name
    file.write_text(f"import gradxform.lab as lab\n{text}")
    return file


def problems(task: dict, **sections) -> list[str]:
    table = {"name": "x", "task": task, "training": {"epochs": 1}}
    table |= {"optimizers": {"a": {"method": "sgd", "learning_rate": 0.1}}} | sections
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    return [str(problem) for problem in caught.value.problems]


def test_the_list_of_our_names_is_complete():
    assert registry.OURS["dataset"] == DATASETS
    assert registry.OURS["surface"] == tuple(SURFACES)
    assert set(registry.OURS["model"]) == set(MODELS)
    assert set(registry.OURS["task"]) == set(KINDS)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: lab.dataset("digits")(list),
            "lab.dataset(name='digits'): gradxform has a dataset",
        ),
        (lambda: lab.method("adam")(list), "lab.method(name='adam'): gradxform has a method"),
        (lambda: lab.task("surface")(list), "lab.task(name='surface'): gradxform has a task"),
        (lambda: lab.model("a b")(list), "lab.model(name='a b'): give a letter, then letters"),
        (lambda: lab.model("optax.sgd")(list), "lab.model(name='optax.sgd'): give a letter"),
        (lambda: lab.model("net")(3), "lab.model(name='net'): decorate a function, found 3"),
        (
            lambda: lab.surface("s", start=(1,), bounds=((0, 1), (0, 1)))(abs),
            "lab.surface(start=(1,)): give pairs of numbers",
        ),
        (
            lambda: lab.surface("s", start=(1, 1), bounds=((0, 1), (2, 1)))(abs),
            "lab.surface(bounds=((0, 1), (2, 1))): the first of a pair should be the lower",
        ),
    ],
)
def test_names_that_are_refused(call, told):
    with pytest.raises(ValueError, match=r"^lab") as caught:
        call()
    assert str(caught.value).startswith(told)


def test_a_cell_of_a_notebook_can_be_run_again():
    for value in (1, 2):
        lab.dataset("mine")(lambda value=value: value)
    assert registry.find("dataset", "mine").make() == 2


def test_two_files_cannot_register_one_name(tmp_path):
    text = "@lab.dataset('mine')\ndef f(): pass\n"
    files = [written(tmp_path, text, f"{name}.py") for name in ("one", "two")]
    with pytest.raises(OwnFileError, match=r"two.py, line 2: ValueError: .*one.py has registered"):
        own_files.load(files)
    own_files.load(files[:1])  # but one file again


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1 +", "mylab.py, line 2: SyntaxError: invalid syntax"),
        ("def f():\n    return y\nf()", "mylab.py, line 3: NameError: name 'y' is not defined"),
        ("import nowhere_to_be_found", "mylab.py, line 2: ModuleNotFoundError: No module named"),
        ("raise SystemExit('no')", "mylab.py, line 2: SystemExit: no"),
        ("raise KeyError('a\\nb')", "mylab.py, line 2: KeyError: 'a\\nb'"),
        ("lab.nothing", "mylab.py, line 2: AttributeError: "),
        ("\0", "mylab.py"),
    ],
)
def test_a_file_that_fails_is_told_in_one_line_with_its_own_words(tmp_path, text, told):
    file = written(tmp_path, text)
    with pytest.raises(OwnFileError) as caught:
        own_files.load([file])
    assert str(caught.value).startswith(f"--with {file}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_python_files(tmp_path):
    good = written(tmp_path, "")
    (tmp_path / "other").mkdir()
    twin = written(tmp_path / "other", "")
    for files, told in [
        ([tmp_path / "none.py"], "cannot be read: No such file"),
        ([tmp_path / "notes.txt"], "should be a Python file, NAME.py"),
        ([good, twin], "two files are named mylab.py"),
    ]:
        with pytest.raises(OwnFileError, match=told):
            own_files.load(files)


def test_a_link_in_the_folder_of_a_run_is_not_followed(tmp_path):
    outside = written(tmp_path, "raise RuntimeError('was run')")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").touch()
    (folder / "linked.py").symlink_to(outside)
    with pytest.raises(OwnFileError, match=r"linked\.py: is a link"):
        own_files.load([folder / "linked.py"])


def test_what_runs_is_what_the_digest_is_of(tmp_path):
    """No cache of an older content is used, nor written."""
    file = written(tmp_path, "@lab.dataset('d')\ndef f(): return 1\n")
    own_files.load([file])
    before = own_files.with_digests({})["with_files"]
    written(tmp_path, "@lab.dataset('d')\ndef f(): return 2\n")
    own_files.load([file])
    assert registry.find("dataset", "d").make() == 2
    assert own_files.with_digests({})["with_files"] != before
    assert not (tmp_path / "__pycache__").exists()


def test_a_config_cannot_reach_more_than_a_registered_name(tmp_path):
    lab.model("net")(lambda shape: None)
    lab.method("step")(lambda rate: None)
    own = {"kind": "classification", "dataset": "digits", "model": "net"}
    for name in (
        "net.__globals__",
        "net.make",
        "mylab.net",
        "os",
        "__import__",
        "gradxform_with_x",
    ):
        assert problems(own | {"model": name})[0].startswith("task.model: should be 'keras_mlp'")
        told = problems(own, optimizers={"a": {"method": name}})
        assert told[0].startswith("optimizers.a.method: no method named")
    # nor give what the lab gives, nor name a file to run
    assert problems(own | {"model_options": {"shape": [3]}}) == [
        "task.model_options.shape: unknown argument of net; it takes none"
    ]
    file = written(tmp_path, "raise RuntimeError('was run')")
    told = problems(own | {"model": "other"}, with_files={str(file): "0" * 64})
    assert told == [
        f"--with {file} is missing: this config was run with it; "
        "for a new run remove [with_files] from the config"
    ]
    for key in ("with", "import", "run", "python"):
        assert "unknown key" in problems(own, **{key: str(file)})[0]


def test_names_are_checked_with_the_nearest_one():
    lab.model("my_net")(lambda width=4: None)
    lab.dataset("my_data")(lambda: None)
    lab.task("my_task")(lambda noise=0.1: None)
    lab.method("my_method")(lambda rate, steps: None)
    lab.surface("my_surface", start=(0, 0), bounds=((0, 1), (0, 1)))(lambda x: x[0])
    own = {"kind": "classification", "dataset": "my_data", "model": "my_net"}
    for changes, told in [
        ({"model": "my_nett"}, "did you mean 'my_net'?"),
        ({"dataset": "mydata"}, "did you mean 'my_data'?"),
        ({"kind": "my_tusk"}, "did you mean 'my_task'?"),
        (
            {"model_options": {"widht": 3}},
            "task.model_options.widht: unknown argument of my_net, did you mean 'width'?",
        ),
        ({"model_options": {"width": "wide"}}, "task.model_options.width: should be a number"),
        ({"dataset_options": {"n": 3}}, "unknown argument of my_data; it takes none"),
    ]:
        assert told in problems(own | changes)[0]
    assert problems({"kind": "my_task", "nois": 1.0}) == [
        "task.nois: unknown argument of my_task, did you mean 'noise'?"
    ]
    surface = {"kind": "surface", "surface": "my_surfac"}
    assert "did you mean 'my_surface'?" in problems(surface, training={"steps": 1})[0]
    assert problems(own, optimizers={"a": {"method": "my_methd", "rate": 1}}) == [
        "optimizers.a.method: no method named 'my_methd' in gradxform, optax or optax.contrib, "
        "did you mean 'my_method'?"
    ]
    assert problems(own, optimizers={"a": {"method": "my_method", "rate": "a"}}) == [
        "optimizers.a.rate: should be a number, found 'a'",
        "optimizers.a.steps: missing: my_method needs it (a number)",
    ]
    choices = task_choices()
    assert "my_data" in choices["classification"]["dataset"]
    assert "my_surface" in choices["surface"]["surface"]
    assert "my_task" in choices


def test_the_numbers_of_a_method_are_swept_like_ours():
    def mine(learning_rate, size: int, width=1.0, on=False, name="a", base=None, other: float = 1):
        pass

    lab.method("mine")(mine)
    assert catalogue.numbers({"method": "mine"}) == {
        "learning_rate": False,
        "size": True,
        "width": False,
        "other": False,
    }


def test_our_annotations_keep_their_ranges():
    from gradxform.hyperparameters import Fraction, LearningRate

    def mine(rate: LearningRate, momentum: Fraction = 0.5):
        pass

    lab.method("mine")(mine)
    told = list(
        methods.check(
            {
                "method": "mine",
                "rate": {"schedule": "linear_decay", "init_value": 1.0, "steps": 3},
                "momentum": 2.0,
            },
            "a",
        )
    )
    assert "a.momentum: should be at least 0 and below 1, found 2.0" in map(str, told)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            {},
            ['task.dataset: missing, for instance dataset = "digits", or file = "data.csv" with '],
        ),
        ({"file": "a.csv"}, ["task.target: missing: the column to predict"]),
        ({"file": "a.csv", "target": "y", "dataset": "digits"}, ["task.file: give either"]),
        ({"dataset": "digits", "target": "y"}, ["task.target: is for data from a file"]),
        ({"dataset": "digits", "standardise": True}, ["task.standardise: is for data from a"]),
        ({"dataset": "digits", "dataset_options": {}}, ["task.dataset_options: are for"]),
        ({"file": "a.csv", "target": "y", "test_split": 1.5}, ["task.test_split: should be less"]),
    ],
)
def test_data_come_from_one_place(task, told):
    found = problems({"kind": "classification", "model": "logistic"} | task)
    assert [text[: len(start)] for text, start in zip(found, told, strict=True)] == told


def test_defaults_of_own_data_are_filled_in_and_ours_stay_as_they_are():
    table = {"name": "x", "training": {"epochs": 1}, "optimizers": {"a": {"method": "newton"}}}
    task = {"kind": "regression", "file": "a.csv", "target": "y", "model": "linear"}
    text = to_toml(parse_config(table | {"task": task}))
    assert "test_split = 0.2\n" in text
    ours = {"kind": "classification", "dataset": "digits", "model": "logistic"}
    assert "test_split" not in to_toml(parse_config(table | {"task": ours}))


def test_importing_the_lab_is_quick_and_without_jax():
    code = "import gradxform.lab, sys; print({'jax', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_own_names_are_listed(tmp_path):
    file = written(
        tmp_path,
        "@lab.method('mine')\ndef f(rate): 'My method.'\n@lab.task('t')\ndef t(n=1): pass\n",
    )
    done = CliRunner().invoke(app, ["list", "--with", str(file)])
    assert done.exit_code == 0, done.output
    assert "My method." in done.output
    assert "keys: n" in done.output
