"""``gradxform show``: every key, explained, in a text that is the config itself."""

import re
import tomllib

import pytest

from gradxform import lab
from gradxform.lab.experiment import keys, registry
from gradxform.lab.experiment.kinds import KINDS, kind_of
from gradxform.lab.experiment.load import load_config, parse_config, read_config, shipped_configs
from gradxform.lab.experiment.shown import shown
from tests.lab.commands.test_cli import fails, invoke


@pytest.mark.parametrize("name", shipped_configs())
def test_what_is_shown_is_the_config(name):
    config = load_config(name)
    text = shown(config)
    assert read_config(text.encode(), name) == config
    assert max(len(line) for line in text.splitlines() if line.startswith("# ")) <= 100


@pytest.mark.parametrize("name", ["digits_race", "valley", "learning_rate", "surfaces"])
def test_every_key_is_there_with_its_meaning_and_default(name):
    config = load_config(name)
    text = shown(config)
    words = re.sub(r"\n# ", " ", text)
    todo = [type(config)]
    seen = 0
    while todo:
        table = todo.pop()
        for key, field in table.model_fields.items():
            inner = [part for part, _ in keys.inner_tables(field.annotation)]
            todo += inner
            if not inner and key != "optimizers":
                seen += 1
                free = rf"|\[[^]]*\.{key}[].]"  # a table whose keys are up to the user
                assert re.search(rf"(?m)^(# )?{key} ={free}", text), key
                assert keys.meanings(table)[key].replace("``", "") in words, key
                if default := keys.default(field).replace("``", ""):
                    assert f"default {default}" in words, key
    assert seen > 10


def test_a_key_that_is_not_given_can_be_edited_in_place():
    text = shown(load_config("digits_race"))
    for name, value in (("examples", 500), ("keep", 0.25), ("seeds", 3)):
        line = re.search(rf"(?m)^# {name} =.*$", text)
        text = text.replace(line[0], f"{name} = {value}")
    table = tomllib.loads(text.replace("# [sweep]", "[sweep]"))
    assert table["task"]["examples"] == 500
    assert (table["sweep"]["seeds"], table["sweep"]["keep"]) == (3, 0.25)


def test_own_names_and_files_are_shown():
    lab.task("line")(lambda noise, units=None: None)
    common = {"name": "x", "training": {"epochs": 3}, "optimizers": {"a": {"method": "adam"}}}
    options = {"noise": 0.5, "units": {"x": "m"}}
    table = {"kind": "regression", "file": "data.csv", "target": "y", "model": "linear"}
    for task in ({"kind": "line", **options}, table):
        config = parse_config(common | {"task": task})
        assert read_config(shown(config).encode(), "x") == config
    registry.forget()


def test_the_command_prints_it():
    done = invoke("show", "valley", "--set", "training.steps=7")
    assert done.exit_code == 0
    assert done.stdout == shown(load_config("valley", ["training.steps=7"]))
    assert "steps = 7\n" in done.stdout
    assert "did you mean 'valley'" in fails("show", "valey")


def test_every_key_has_a_meaning():
    for kind in KINDS.values():
        todo = [kind.schema]
        while todo:
            table = todo.pop()
            for key, field in table.model_fields.items():
                inner = [part for part, _ in keys.inner_tables(field.annotation)]
                todo += inner
                assert inner or keys.meanings(table).get(key), (table, key)
    assert kind_of(load_config("valley")) is KINDS["surface"]
