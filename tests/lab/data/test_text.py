"""The synthetic text: the same each time, English in its agreement, and fit to be learnt."""

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.lab.data import text
from gradxform.lab.data.sets import load, synthetic_text
from gradxform.lab.tasks.task import Batch, ModelError, make_task, objective
from gradxform.lab.training.race import race_on_task


def test_the_text_is_the_same_each_time():
    written = text.write(300_000)
    assert len(written) == 300_000
    assert hashlib.sha256(written.encode()).hexdigest() == (
        "5fee0b8f490e1c81baffea62ec78126d9b57c8979c4d018be2dc3e3a144cc9ef"
    )
    assert text.write(1000) == written[:1000]
    assert text.write(1000, seed=1) != written[:1000]


def test_verbs_agree_with_their_subjects():
    grammar = text._grammar()
    kinds = ("noun1", "noun2", "verb1", "verb2", "rest1", "rest2", "adjective")
    lexicon = {kind: {parts[0][0] for parts in grammar[kind]} for kind in kinds}
    assert {"wolf", "duchess", "lady"} <= lexicon["noun1"]
    assert {"wolves", "duchesses", "ladies"} <= lexicon["noun2"]
    assert {"watches", "envies", "obeys"} <= lexicon["verb1"]
    number = {word: kind[-1] for kind in kinds[:-1] for word in lexicon[kind]}
    nouns = "|".join(lexicon["noun1"] | lexicon["noun2"])
    verbs = "|".join(word for word in number if word not in lexicon["noun1"] | lexicon["noun2"])
    adjective = f"(?:(?:{'|'.join(lexicon['adjective'])}) )?"
    subject = rf"(?:^|[.!?\"] )\"?\w+ {adjective}({nouns})"
    following = (
        f"{subject} ({verbs})",
        f"({nouns}) who ({verbs})",
        rf"{subject} who (?:{verbs}) \w+ {adjective}(?:{nouns}) ({verbs})",  # past another noun
    )
    written = text.write(300_000)
    for pattern in following:
        pairs = re.findall(rf"{pattern}\b", written, re.MULTILINE)
        seen = {(number[noun], number[verb]) for noun, verb in pairs}
        assert seen == {("1", "1"), ("2", "2")}
        assert len(pairs) > 30


def test_a_passage_is_about_two_people_who_come_back():
    names = set(text._NAMES.split())
    passages = text.write(100_000).splitlines()[:-1]
    repeats = []
    for passage in passages:
        named = [word for word in re.findall(r"\w+", passage) if word in names]
        assert len(set(named)) == 2
        repeats.append(len(named))
        assert passage.count('"') % 2 == 0
        assert "^" not in passage
        assert passage[0].isupper()
    assert np.mean(repeats) > 6


def test_sentences_nest():
    longest = max(re.findall(r"(?:whom? [^,.?!\"]*)", text.write(100_000)), key=len)
    assert len(re.findall(r"whom?", longest)) >= 3


def test_cut():
    split = text.cut("abcabca", "abc", 3)
    np.testing.assert_array_equal(split.x, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(split.y, [[1, 2, 0], [1, 2, 0]])
    assert (split.x.dtype, split.y.dtype) == (np.uint8, np.int32)
    assert text.cut("abcabc", "abc", 3).x.shape == (1, 3)  # the last has no next character


def test_the_parts_are_apart():
    data = load("synthetic_text")
    assert data.train.x.shape == data.train.y.shape == (4096, 64)
    assert data.test.x.shape == data.test.y.shape == (512, 64)
    for split in (data.train, data.test):
        np.testing.assert_array_equal(split.x.ravel()[1:], split.y.ravel()[:-1])
        assert split.y.max() < data.num_classes == len(data.alphabet)
    assert set(data.train.x.ravel()) == set(range(data.num_classes))
    whole = data.train.x.tobytes()
    assert not any(sequence.tobytes() in whole for sequence in data.test.x)


def test_the_alphabet_reads_the_text_back():
    data = synthetic_text(length=10, train_size=20, test_size=3)
    read = "".join(data.alphabet[number] for number in data.test.x.ravel())
    assert read == text.write(30, seed=1)


def tiny_task(**options):
    data = synthetic_text(length=16, train_size=256, test_size=64)
    model_options = {"width": 16, "layers": 1, "heads": 2}
    return make_task(data, "transformer", model_options=model_options, **options)


def test_the_loss_is_the_mean_over_examples_and_positions():
    task = tiny_task()
    params = jax.jit(task.init)(jax.random.key(0))
    x, y = task.test.x[:5], task.test.y[:5]
    weight = np.array([1, 1, 0, 1, 0], np.float32)
    batch, key = Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weight)), jax.random.key(1)
    logits = np.asarray(jax.jit(task.model)(params, batch.x, key), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    losses = -np.log(np.take_along_axis(chances, y[..., None], axis=-1))[..., 0].mean(axis=1)
    value = jax.jit(lambda params: objective(task, batch, key)(params))(params)
    np.testing.assert_allclose(value, losses[weight == 1].mean(), rtol=1e-5)
    sums = jax.jit(task.metrics)(params, batch)
    np.testing.assert_allclose(sums["loss"], losses @ weight, rtol=1e-5)
    correct = (logits.argmax(axis=-1) == y).mean(axis=1)
    np.testing.assert_allclose(sums["accuracy"], correct @ weight, rtol=1e-6)
    drawn = task.draw(key, batch)
    jax.tree.map(np.testing.assert_array_equal, drawn, batch)


@pytest.mark.parametrize(
    ("dataset", "model", "message"),
    [
        ("digits", "transformer", "transformer does not fit digits: it needs text"),
        ("synthetic_text", "logistic", "logistic does not fit synthetic_text: it needs images"),
    ],
)
def test_text_and_images_are_told_apart(dataset, model, message):
    with pytest.raises(ModelError, match=message):
        make_task(load(dataset), model)


def test_training_learns_more_than_how_frequent_the_characters_are():
    task = tiny_task()
    (history,) = race_on_task(task, {"x": gx.adam(0.02)}, epochs=6, batch_size=32).histories
    _, counts = np.unique(task.train.y, return_counts=True)
    frequency = counts / counts.sum()
    unigram = -np.sum(frequency * np.log(frequency))
    assert history.rows[-1]["train_loss"] < unigram - 0.1
    assert history.rows[-1]["test_accuracy"] > frequency.max()
