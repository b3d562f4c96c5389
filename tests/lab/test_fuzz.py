"""Malformed configs by the hundred: each is refused with a place and a mend, or is meant so.

``GRADXFORM_FUZZ=10000`` tries as many of them as that.
"""

import collections
import contextlib
import copy
import math
import os
import random
import re
import signal
import tomllib

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from gradxform.lab.cli import app
from gradxform.lab.experiment.catalogue import PACKAGES, methods
from gradxform.lab.experiment.load import (
    ConfigError,
    load_config,
    parse_config,
    shipped_configs,
    sweep_members,
    to_toml,
)
from gradxform.lab.experiment.methods import build_all
from gradxform.lab.report import movies
from gradxform.lab.tasks.surfaces import SURFACES
from gradxform.lab.training import race as train
from gradxform.lab.training import sweep
from gradxform.lab.training.settings import collecting
from gradxform.lab.training.surfaces import make_walk

CASES = int(os.environ.get("GRADXFORM_FUZZ", "600"))  # 10000 for a long look
TEXTS = {name: path.read_bytes() for name, path in shipped_configs().items()}
TABLES = {name: tomllib.loads(text.decode()) for name, text in TEXTS.items()}
SECTIONS = {key for table in TABLES.values() for key in table} | {"sweep", "checkpoint", "output"}

NUMBERS = (
    *(0, 1, -1, 2, 1.5, 0.5, -0.0, 1e-3, 1e-300, 5e-324, 1e39, 1e300, -1e300, 10**6, 2**31, 2**63),
    *(10**30, 10**400, -(10**400), math.nan, math.inf, -math.inf),
)
WORDS = (
    *("", " ", "adam", "sgd", "full", "nan", "true", "1", "../x", "a/b", "a.b", "x" * 3000, "."),
    *("é", "学习率", "\x00", "\x7f", "\u202e", "\n", '"', "$x_$", "٣", "9" * 5000, "None"),
    *("os.system", "optax.adamw", "optax.sgd", "optax.contrib.muon", "optax.__loader__"),
)
TREES = (
    *([], {}, [[]], [{}], {"": 1}, {"a": {"b": 1}}, [1, "a", 2.5], [True, False], [[0, 0], [1]]),
    *({"method": "adam"}, {"method": "sgd"}, {"method": "sgd", "learning_rate": 0.1}),
    *({"method": 3}, {"chain": []}, {"chain": [{"method": "adam"}, 3]}, {"method": "optax.chain"}),
    {"chain": [{"chain": [{"method": "optax.clip", "max_delta": 1.0}]}, {"method": "adam"}]},
    {"method": "adam", "chain": [{"method": "adam"}]},
    {"schedule": "linear_decay", "init_value": 0.1, "end_value": 0.0, "transition_steps": 9},
    {"schedule": "linear_decay", "init_value": math.nan},
    {"schedule": "inverse_time_decay", "init_value": {"schedule": "linear_decay"}, "decay": 1},
    {"schedule": "optax.piecewise_constant_schedule", "init_value": 1, "boundaries_and_scales": {}},
    {
        "schedule": "optax.piecewise_constant_schedule",
        "init_value": 0.1,
        "boundaries_and_scales": {"5": math.nan, "9" * 5000: 0.1, "-1": 0.5},
    },
    *({"schedule": "adam"}, {"schedule": "optax.join_schedules"}, {"schedule": "NoneType"}),
    {"preconditioner": "hutchinson_diagonal", "samples": 4},
    {"preconditioner": "hutchinson_diagonal", "samples": 1.5},
    *({"preconditioner": "hessian"}, "gauss_newton", "hessian", {"curvature": "hessian"}),
    *({"log": [1e-3, 1.0], "points": 3}, {"linear": [0.0, 0.9], "points": 2}, {"log": [1e-3, 1.0]}),
    *({"log": [0, 1], "points": 3}, {"log": [1, 1], "points": 3}, {"log": [0.1, 1], "points": 1}),
    *({"log": [1, 10**400], "points": 3}, {"log": [0.1, 1], "linear": [0, 1]}, {"points": 3}),
    *([0.1, 0.1], [0.1, math.nan], [10**400, 1], [True], [1e-3, "1e-2"], {"log": [], "points": 2}),
    *({"points": 21}, {"points": 10**6}, {"points": True}, [[1, 2]], [[True, 2]], [[math.nan, 0]]),
)
POOL = (*NUMBERS, *WORDS, *TREES, True, False)
KEYS = ("learning_rate", "method", "epochs", "schedule", "chain", "points", "seed", "", "a.b", "é")
SET = (
    *("", "=", "=1", "a", "a=", "a.b.c=1", "training.epochs=", "training.epochs=1.5", "seed=true"),
    *("training..epochs=1", "training.epochs.x=1", "training[0]=1", "task=3", "optimizers=1"),
    *("name=\x00", "title=\udcff", "title=\x00", "output.folder=\x00", "output.folder="),
    *(
        "optimizers.x.method=adam",
        'optimizers."\udcff".method=adam',
        "optimizers.x=adam",
        "seed=1e3",
    ),
    *("training.epochs=\n2\n[task]", "training.epochs=2 # two", "training.epochs='2'", "seed=0x_"),
    *("seed=" + "9" * 5000, "optimizers.x.chain=[{method='sgd'}]", "seed=1979-05-27", "seed=-0"),
    *("x." * 3000 + "y=1", "title=" + "[" * 3000, "title=" + "[" * 3000 + "]" * 3000, "sweep=nan"),
    *("optimizers.x.chain." + "9" * 5000 + ".method=sgd", "sweep.axes.learning_rate=[1e-3, inf]"),
    *("training.max_seconds=nan", "training.max_seconds=" + "9" * 400, "training.batch_size=true"),
)
JUNK = (
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"=", b"[", b"]]", b'"""'),
    *(b"\n[a]\n", b"\na = 1\na = 2\n", b"[" * 3000, b"\nx = " + b"[" * 3000 + b"]" * 3000),
    *(b"\nseed = " + b"9" * 5000 + b"\n", b"\nx = " + b"{a=" * 3000 + b"1" + b"}" * 3000 + b"\n"),
    *(b"\n[" + b"a." * 3000 + b"a]\n", b"\n" + b"a." * 3000 + b"a = 1\n", b"\nx = 0000-99-99\n"),
    *(b"\n[optimizers.x.learning_rate" + b".a" * 3000 + b"]\n", b"\nx = 1e999999\n", b"\\uD800"),
    *(b"\n[sweep.axes" + b".a" * 3000 + b"]\n", b"\n[[optimizers]]\n", b"\n[sweep]\nsamples = 1\n"),
)


MEND = re.compile(
    "should|must be|needs? |missing|did you mean|it takes|the keys here are|the labels are|it has|"
    "they have|write chain|leave|give them|list them|all names|twice|more than|not a table|no item"
)


def places(value, path=()):
    """Every place in nested tables and lists, as the container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def containers(value):
    """All tables in nested tables and lists."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from containers(inner)


def near(value, rng):
    """Another value that may do as well."""
    if type(value) not in (int, float) or not abs(value) < 1e9:
        return value
    others = (value * 2, value / 2, value + 1, value - 1, -value, float(value), int(value))
    return rng.choice((*others, bool(value), str(value), [value], 1 - value, value**2))


def mutated(rng):
    """A shipped config with one to three changes."""
    table = copy.deepcopy(TABLES[rng.choice(list(TABLES))])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(places(table))
        if not spots:
            break
        owner, key = rng.choice(spots)
        other = rng.choice(list(containers(table)))
        match rng.randrange(16):
            case 10 | 11 | 12 | 13 | 14 | 15:  # many of these are no mistakes
                numbers = [(o, k) for o, k in spots if type(o[k]) in (int, float)]
                owner, key = rng.choice(numbers or spots)
                owner[key] = near(owner[key], rng)
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[key[:-1] + rng.choice(("", "s", "_", "é"))] = owner.pop(key)
            case 2:
                owner[key] = {rng.choice(KEYS): owner[key]}
            case 3:
                owner[key] = [owner[key]] * rng.randrange(4)
            case 4:
                other[rng.choice(KEYS)] = copy.deepcopy(rng.choice(POOL))
            case 5:
                other[rng.choice(KEYS)] = copy.deepcopy(owner[key])
            case 6:
                sweep = table.setdefault("sweep", {})
                if isinstance(sweep, dict):
                    which = rng.choice(("axes", "overrides", "seeds", "samples", "starts", "rungs"))
                    value = copy.deepcopy(rng.choice(POOL))
                    if which == "axes":
                        value = {rng.choice(("learning_rate", "b2", "momentum", "")): value}
                    elif which == "overrides":
                        value = {rng.choice(("adam", "sgd", "")): {"learning_rate": value}}
                    sweep[which] = value
            case _:
                owner[key] = copy.deepcopy(rng.choice(POOL))
    return table


def damaged(rng):
    """The bytes of a shipped config, some of them lost, changed or added."""
    text = TEXTS[rng.choice(list(TEXTS))]
    for _ in range(rng.choice((1, 1, 2))):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        lines = text.splitlines(keepends=True)
        match rng.randrange(6):
            case 0:
                text = text[:at]
            case 1:
                text = text[:at] + text[min(to, at + 20) :]
            case 2 if at < len(text):
                text = text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
            case 3:
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                text = b"".join(lines)
            case 4:
                rng.shuffle(lines)
                text = b"".join(lines)
            case _:
                text = text[:at] + rng.choice(JUNK) + text[at:]
        if not text:
            break
    return text


def settings(rng):
    """A few ``--set`` arguments, some of them wrong."""
    made = [rng.choice(SET)]
    table = TABLES[rng.choice(list(TABLES))]
    owner, key = rng.choice(list(places(table)))
    made.append(f"{key}={owner[key]}")
    path = ".".join(rng.choice((*SECTIONS, *KEYS)) for _ in range(rng.randrange(1, 5)))
    made.append(f"{path}={rng.choice(POOL) if rng.random() < 0.5 else rng.choice(WORDS)}")
    return rng.sample(made, rng.randrange(1, 4))


@contextlib.contextmanager
def no_hang(seconds=120):
    """Ends what takes thousands of times as long as it should."""

    def late(*_):
        raise AssertionError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def leaves(value):
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def kept(given, found):
    """Whether all that is given is there, as it was given.

    An integer may have become a float, and a text a list of one.
    """
    if isinstance(given, dict):
        return isinstance(found, dict) and all(
            key in found and kept(value, found[key]) for key, value in given.items()
        )
    if isinstance(given, list):
        return len(given) == len(found) and all(map(kept, given, found))
    if type(given) is str and type(found) is list:
        return found == [given]
    widened = type(given) is int and type(found) is float
    return given == found and (type(given) is type(found) or widened)


def check_accepted(config, given):
    text = to_toml(config)
    again = parse_config(tomllib.loads(text))
    assert to_toml(again) == text
    assert again == config
    dumped = config.model_dump()
    if given is not None:
        assert kept(given, dumped)
    assert not any(isinstance(leaf, float) and math.isnan(leaf) for leaf in leaves(dumped))
    text.encode()  # a lone surrogate has no UTF-8
    if config.sweep is not None:
        overrides = config.training.model_dump().get("overrides", {}).values()
        timed = [x.get("max_seconds") for x in (config.training.model_dump(), *overrides)]
        if not any(timed):
            members = sweep_members(config)
            assert {member.label for member in members} == set(config.optimizers)


def check_refused(error, given):
    assert error.problems
    for problem in error.problems:
        if isinstance(problem, str):
            assert problem.startswith(("not valid TOML: ", "cannot be read: "))
            continue
        assert problem.message.strip()
        assert MEND.search(problem.message), problem
        roots = (*SECTIONS, "--set", *(given or ()))
        assert given is None or problem.path.startswith(roots), problem


def outcome(load, given=None):
    """``"accepted"`` or ``"refused"``, once either is seen to be right."""
    with no_hang():
        try:
            config = load()
        except ConfigError as error:
            check_refused(error, given)
            return "refused"
        check_accepted(config, given)
        try:
            build_all(config.optimizers)
        except ConfigError as error:  # in the words of another package
            (problem,) = error.problems[:1]
            if not (problem.path.startswith("optimizers.") and problem.message.strip()):
                raise
            return "refused"
    return "accepted"


def try_all(one, cases):
    """Each case has a random generator of its own; says how many had which outcome."""
    counts = collections.Counter()
    failures = {}
    for number in range(cases):
        try:
            counts[one(random.Random(number))] += 1
        except Exception as error:
            failures[number] = f"{type(error).__name__}: {str(error)[:300]}"
    print(f"{dict(counts)}, lost {len(failures)}")
    assert not failures
    assert min(counts["accepted"], counts["refused"]) > 0


def test_changed_tables():
    def one(rng):
        table = mutated(rng)
        return outcome(lambda: parse_config(table), table)

    try_all(one, CASES // 4)


def test_damaged_files(tmp_path):
    file = tmp_path / "config.toml"

    def one(rng):
        text = damaged(rng)
        file.write_bytes(text)
        try:
            given = tomllib.loads(text.decode())
        except (ValueError, RecursionError):
            given = None
        return outcome(lambda: load_config(file), given)

    try_all(one, CASES // 4)


def test_wrong_settings():
    def one(rng):
        name, given = rng.choice(list(TABLES)), settings(rng)
        return outcome(lambda: load_config(name, given))

    try_all(one, CASES // 4)


def called(rng):
    """A surface's config with a call of some function, its arguments drawn at random."""
    function = rng.choice([f for package in PACKAGES for f in methods(package)])
    entry = {"method": function.name}
    for key, argument in function.arguments.items():
        if argument.required or rng.random() < 0.3:
            plain = (0.1, 1, 3, 0.9, True, "adam", {"method": "sgd", "learning_rate": 0.1})
            entry[key] = copy.deepcopy(rng.choice(plain if rng.random() < 0.8 else POOL))
    task, training = {"kind": "surface", "surface": "rosenbrock"}, {"steps": 2}
    return {"name": "x", "task": task, "training": training, "optimizers": {"x": entry}}


def test_calls_of_any_method():
    def one(rng):
        table = called(rng)
        return outcome(lambda: parse_config(table), table)

    try_all(one, CASES // 4)


def trace(config):
    """Traces a walk of each optimiser, as a race does before anything is run."""
    problems, surface = [], SURFACES["quadratic"]
    for label, tx in build_all(config.optimizers).items():
        with collecting(problems, f"optimizers.{label}"):
            jax.eval_shape(make_walk(surface.fn, tx, 1), jnp.ones(2))
    if problems:
        raise ConfigError("x", problems)
    return config


def test_what_only_fails_in_a_race_is_told_too():
    def one(rng):
        with contextlib.suppress(ConfigError):
            config = parse_config(called(rng))
            with no_hang(), contextlib.suppress(ConfigError):
                trace(config)
                return "accepted"
        return "refused"

    try_all(one, CASES // 20)


def test_the_command_line_ends_in_a_line(tmp_path, monkeypatch):
    """What is accepted ends before it is trained."""

    def ends(*_, **__):
        raise OSError("ends here")

    monkeypatch.setattr(train, "race", ends)
    monkeypatch.setattr(sweep, "sweep", ends)
    monkeypatch.setattr(movies, "movie", ends)
    monkeypatch.setenv("GRADXFORM_DATA", str(tmp_path))
    file = tmp_path / "config.toml"
    for number in range(max(CASES // 20, 10)):
        rng = random.Random(number)
        file.write_bytes(damaged(rng))
        given = [arg for text in settings(rng)[: rng.randrange(2)] for arg in ("--set", text)]
        command = rng.choice(("run", "sweep", "movie"))
        args = (command, file, "--out", tmp_path / "out", *given)
        done = CliRunner().invoke(app, list(map(str, args)))
        assert isinstance(done.exception, SystemExit), (number, done.exception)
        assert done.exit_code == 2
        assert done.stderr.startswith("gradxform: ")
        assert "Traceback" not in done.output
        assert not (tmp_path / "out").exists()


NESTED = {"a": 1}
for _ in range(100):
    NESTED = {"a": NESTED}
ADAM = {"a": {"method": "adam"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": {"start": [True, 0]}}, "task.start: should be a pair of numbers"),
        ({"seed": NESTED}, "seed: tables or lists are nested more than 32 levels deep"),
        ({"output": {"folder": "a\0"}}, "output.folder: should name a folder"),
        ({"output": {"folder": ""}}, "output.folder: should name a folder"),
        (
            {"optimizers": {"a": {"method": "optax.adam", "learning_rate": math.nan}}},
            "optimizers.a.learning_rate: should be a number that float32 can hold, found nan",
        ),
        (
            {"optimizers": {"a": {"method": "sgd", "learning_rate": 10**60}}},
            "optimizers.a.learning_rate: should be a number that float32 can hold, found 1000",
        ),
        (
            {"optimizers": ADAM, "sweep": {"axes": {"b2": [10**400]}}},
            "sweep.axes.b2: should be a list of numbers",
        ),
        (
            {
                "optimizers": {"a": {"chain": [{"method": "adam"}]}},
                "sweep": {"axes": {"chain": {"0": {"b2": [0.9]}}, "chain.0.b2": [0.99]}},
            },
            "sweep.axes.chain.0.b2: appears twice",
        ),
    ],
)
def test_what_it_found(changes, told):
    task = {"kind": "surface", "surface": "saddle"} | changes.get("task", {})
    table = {"name": "x", "training": {"steps": 1}, "optimizers": ADAM} | changes | {"task": task}
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    assert any(str(problem).startswith(told) for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"seed = " + b"9" * 5000, "not valid TOML: a whole number has too many digits"),
        (b"seed = " + b"[" * 3000, "not valid TOML: lists or tables are nested too deep"),
        (b"title = '\xff'", "cannot be read: 'utf-8' codec"),
    ],
)
def test_what_no_parser_of_toml_takes(tmp_path, content, told):
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_config(file)
