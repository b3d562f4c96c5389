"""The race: the loop one would write, fair, resumable, sweepable, safe when it diverges."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.info import diagnostics
from gradxform.lab.data.sets import Dataset, Split, load
from gradxform.lab.experiment import methods
from gradxform.lab.experiment.load import ConfigError, load_config, parse_config
from gradxform.lab.tasks.surfaces import SURFACES
from gradxform.lab.tasks.task import Batch, make_task, objective
from gradxform.lab.training import epoch as lab_epoch
from gradxform.lab.training import race as lab_train
from gradxform.lab.training.batching import epoch_batches
from gradxform.lab.training.epoch import evaluate, init_state, make_epoch, to_device
from gradxform.lab.training.outcomes import RaceResult, ranked
from gradxform.lab.training.race import race, race_on_task
from gradxform.lab.training.surfaces import make_walk, race_on_surface

SIZE = 50


def dataset(size=SIZE, seed=0):
    """Images whose class is where the ink is: easy, so that a race shows something."""
    rng = np.random.default_rng(seed)

    def split(n):
        y = rng.integers(0, 3, n).astype(np.int32)
        x = rng.integers(0, 6, (n, 4, 4)).astype(np.uint8)
        x[np.arange(n), y] += 10
        return Split(x, y)

    return Dataset("blobs", split(size), split(20), 3, 16.0)


@pytest.fixture(scope="module")
def task():
    return make_task(dataset(), "logistic")


@pytest.fixture(scope="module")
def noisy():
    options = {"hidden": [6], "dropout": 0.5, "input_dropout": 0.0}
    return make_task(dataset(), "mlp", model_options=options, l2=1e-3)


def by_hand(task, tx, *, epochs, batch_size, order, seed):
    """The same training as a Python loop: the mean cost of each epoch, and the parameters."""
    x, y = map(jnp.asarray, task.train)
    init_key, key = jax.random.split(jax.random.key(seed))
    batch_key, noise_key = jax.random.split(key)
    params = task.init(init_key)
    state, costs = tx.init(params), []

    @jax.jit
    def step(params, state, indices, weights, key):
        sample, dropout = jax.random.split(key)
        batch = Batch(x[indices], y[indices], weights)
        batch = task.draw(sample, batch) if order == "online" else batch
        value, grads = jax.value_and_grad(objective(task, batch, dropout))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for epoch in range(epochs):
        size = len(task.train.x)
        batches = epoch_batches(batch_key, epoch, size=size, batch_size=batch_size, order=order)
        keys = jax.random.split(jax.random.fold_in(noise_key, epoch), len(batches.indices))
        total = 0.0
        for indices, weights, step_key in zip(*batches, keys, strict=True):
            params, state, value = step(params, state, indices, weights, step_key)
            total += float(value) * float(weights.sum())
        costs.append(total / size if order != "online" else total / weights.size / len(keys))
    return costs, gx.eval_params(state, params)


@pytest.mark.parametrize("order", ["reshuffle", "online"])
def test_an_epoch_is_the_loop_one_would_write(noisy, order):
    settings = {"epochs": 2, "batch_size": 16, "order": order, "seed": 3}
    tx = gx.nesterov(0.1, 0.8)
    costs, params = by_hand(noisy, tx, **settings)
    (history,) = race_on_task(noisy, {"a": tx}, **settings).histories
    np.testing.assert_allclose([row["cost"] for row in history.rows], costs, rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), history.params, params
    )


def test_metrics_are_those_of_the_whole_parts(monkeypatch):
    monkeypatch.setattr(lab_epoch, "EVALUATION_BLOCK", 7)  # 20 and 45 are no multiples of it
    task = make_task(dataset(), "logistic", validation_split=0.1)
    (history,) = race_on_task(task, {"a": gx.sgd(0.5)}, epochs=2, batch_size=8).histories
    for name, part in {
        "train": task.train,
        "validation": task.validation,
        "test": task.test,
    }.items():
        batch = Batch(part.x, part.y, jnp.ones(len(part.x)))
        sums = task.metrics(history.params, batch)
        for metric in ("loss", "accuracy"):
            expected = float(sums[metric]) / len(part.x)
            assert history.rows[-1][f"{name}_{metric}"] == pytest.approx(expected, rel=1e-5)


def test_full_batch_makes_one_update_an_epoch(task):
    (history,) = race_on_task(task, {"a": gx.sgd(0.1)}, epochs=3, batch_size="full").histories
    params = task.init(jax.random.split(jax.random.key(0))[0])
    batch = Batch(task.train.x, task.train.y, jnp.ones(SIZE))
    for row in history.rows:
        cost, grads = jax.value_and_grad(objective(task, batch, jax.random.key(0)))(params)
        assert row["cost"] == pytest.approx(float(cost), rel=1e-5)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_all_start_alike_and_see_the_same_batches(noisy):
    entries = {"a": gx.sgd(0.0), "b": gx.adam(0.01), "c": optax.sgd(0.0)}
    result = race_on_task(noisy, entries, epochs=2, batch_size=16, seed=1)
    costs = {h.label: [row["cost"] for row in h.rows] for h in result.histories}
    assert costs["a"] == costs["c"]  # at rate 0 every batch and every dropped unit must agree
    assert costs["a"][0] != costs["a"][1]
    assert costs["a"] != costs["b"]


def test_another_seed_is_another_run(task):
    runs = [
        race_on_task(task, {"a": gx.sgd(0.1)}, epochs=1, batch_size=16, seed=seed)
        for seed in (0, 0, 1)
    ]
    costs = [run.histories[0].rows[0]["cost"] for run in runs]
    assert costs[0] == costs[1] != costs[2]


def test_metrics_are_taken_at_eval_params(task):
    tx = gx.polyak_average(gx.sgd(0.5))
    (history,) = race_on_task(task, {"a": tx}, epochs=2, batch_size=10).histories
    (plain,) = race_on_task(task, {"a": gx.sgd(0.5)}, epochs=2, batch_size=10).histories
    assert [r["cost"] for r in history.rows] == [r["cost"] for r in plain.rows]
    assert history.rows[-1]["train_loss"] != plain.rows[-1]["train_loss"]


def test_a_method_gets_value_grad_and_value_fn(noisy):
    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        agrees = jnp.abs(value_fn(params) - value) <= 1e-6 * jnp.abs(value)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), updates, grad)
        agrees &= jnp.all(jnp.stack(jax.tree.leaves(same)))
        return jax.tree.map(lambda g: jnp.where(agrees, 0, jnp.nan) * g, updates), state

    probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
    (history,) = race_on_task(noisy, {"a": probe}, epochs=1, batch_size=16).histories
    assert not history.diverged


@pytest.mark.parametrize(
    "tx",
    [
        gx.coordinate_descent(block="leaf"),
        gx.rmsprop(0.01, momentum=0.9, nesterov=True),
        optax.lbfgs(memory_size=3),
        optax.chain(optax.add_noise(0.01, 0.5, 0), optax.sgd(0.1)),
        optax.inject_hyperparams(gx.adam)(learning_rate=0.1),
        optax.MultiSteps(gx.sgd(0.1), 2).gradient_transformation(),
    ],
    ids=["coordinates", "rmsprop", "lbfgs", "noise", "inject", "multi"],
)
def test_all_kinds_of_state_go_through(task, tx):
    (history,) = race_on_task(task, {"a": tx}, epochs=4, batch_size="full").histories
    assert history.rows[-1]["cost"] < history.rows[0]["cost"]


def test_the_full_batch_config_trains_at_accepted_points():
    smaller = ["task.dataset=digits", "task.model_options.hidden=4", "training.epochs=25"]
    result = race(load_config("mnist_full_batch", smaller), load("digits"))
    histories = {h.label: h for h in result.histories}
    assert set(histories) == {"adam", "lbfgs", "bfgs", "nonlinear_cg"}
    for label, history in histories.items():
        costs, losses = (np.array([r[key] for r in history.rows]) for key in ("cost", "train_loss"))
        assert len(losses) == 25
        assert losses[-1] < 0.8 * costs[0]
        if label != "adam":  # what is reported was evaluated in the loop, and never gets worse
            seen = [np.min(np.abs(costs[: i + 1] - loss)) for i, loss in enumerate(losses)]
            assert np.max(seen) < 1e-5
            assert np.max(np.diff(losses)) < 1e-5


GAUSS_NEWTON = {"method": "newton_cg", "curvature": "gauss_newton", "damping": 0.1}


@pytest.mark.parametrize(
    ("name", "raced"),
    [
        ("digits_second_order", ["newton, searching"]),
        ("mnist_second_order", ["newton_cg, Gauss-Newton", "trust_region, Hessian"]),
    ],
)
def test_the_second_order_configs_train(name, raced):
    tiny = ["task.dataset=digits", "task.model_options.hidden=2"]
    experiment = load_config(name, tiny)
    methods.build_all(experiment.optimizers)
    overrides = {
        k: experiment.training.overrides[k].model_copy(update={"epochs": 8}) for k in raced
    }
    training = experiment.training.model_copy(update={"overrides": overrides})
    chosen = {label: experiment.optimizers[label] for label in raced}
    result = race(
        experiment.model_copy(update={"training": training, "optimizers": chosen}), load("digits")
    )
    for history in result.histories:
        last = history.rows[-1]
        assert last["train_loss"] < 0.95 * history.rows[0]["cost"]
        assert last["step"] == 8
        assert last["gradients"] > 8


def test_a_row_tells_the_work_so_far(noisy):
    entries = {
        "first order": gx.sgd(0.1),
        "products": methods.build(GAUSS_NEWTON, "x"),
        "nested": gx.inject_hyperparams(gx.newton_cg)(learning_rate=0.1, tol=0.5),
        "evaluations": gx.coordinate_descent(block="leaf"),
    }
    states = {label: [] for label in entries}
    for label, tx in entries.items():
        epoch = jax.jit(make_epoch(noisy, tx, batch_size=20))
        state = init_state(tx, noisy.init(jax.random.key(0)), jax.random.key(1))
        for _ in range(2):
            state, result = epoch(state, to_device(noisy.train))
            states[label].append((state.opt_state, float(result.work)))
    for label, name in [("products", "curvature_products"), ("nested", "curvature_products")]:
        (opt_state, first), (end, second) = states[label]
        counts = [optax.tree.get(s, name) for s in (opt_state, end)]
        assert 0 < counts[0] < counts[1]
        assert (first, second) == (3 + counts[0], 3 + counts[1] - counts[0])
    assert [work for _, work in states["first order"]] == [3, 3]
    (_, first), (end, second) = states["evaluations"]
    assert first + second == 6 + optax.tree.get(end, "evaluations")


def test_gradients_are_of_the_whole_training_part(task):
    settings = {"epochs": 3, "batch_size": 16}  # four batches of 16 for 50 examples
    (history,) = race_on_task(task, {"a": gx.sgd(0.1)}, **settings).histories
    assert [row["step"] for row in history.rows] == [4, 8, 12]
    np.testing.assert_allclose([row["gradients"] for row in history.rows], [1.28, 2.56, 3.84])
    seconds = [row["seconds"] for row in history.rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@diagnostics
class _Info(NamedTuple):
    curvature_products: jax.Array
    gradient_equivalents: jax.Array


class _State(NamedTuple):
    info: _Info


def test_gradient_equivalents_stand_for_the_other_counters(task):
    def update(updates, state, params=None):
        products, equivalents = state.info
        return updates, _State(_Info(products + 7, equivalents + 0.5))

    start = _State(_Info(jnp.zeros((), jnp.int32), jnp.zeros(())))
    link = optax.GradientTransformation(lambda params: start, update)
    result = race_on_task(task, {"a": optax.chain(link, gx.sgd(0.1))}, epochs=2, batch_size="full")
    rows = result.histories[0].rows
    np.testing.assert_allclose([row["gradients"] for row in rows], [1.5, 3.0])


def test_searches_of_optax_count_their_evaluations(task):
    tx = optax.lbfgs(memory_size=3)
    result = race_on_task(task, {"a": tx}, epochs=3, batch_size="full", order="sequential")
    batch = Batch(*map(jnp.asarray, task.train), jnp.ones(SIZE))
    value_fn = objective(task, batch, jax.random.key(0))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params = task.init(jax.random.split(jax.random.key(0))[0])
    state, work = tx.init(params), 0
    for row in result.histories[0].rows:
        params, state = step(params, state)
        work += 1 + int(optax.tree.get(state, "num_linesearch_steps"))
        assert row["gradients"] == work


def test_an_override_is_the_race_it_would_be_alone(noisy):
    entries = {"many": gx.sgd(0.1), "few": gx.momentum(0.1)}
    own = {"epochs": 3, "batch_size": "full", "order": "sequential"}
    settings = {"epochs": 2, "batch_size": 16, "seed": 2}
    many, few = race_on_task(noisy, entries, **settings, overrides={"few": own}).histories
    (alone,) = race_on_task(noisy, {"few": gx.momentum(0.1)}, **settings | own).histories
    (other,) = race_on_task(noisy, {"many": gx.sgd(0.1)}, **settings).histories
    assert [r["cost"] for r in few.rows] == [r["cost"] for r in alone.rows]
    assert [r["cost"] for r in many.rows] == [r["cost"] for r in other.rows]
    assert [r["step"] for r in few.rows] == [1, 2, 3]


def test_overrides_name_labels_and_settings(task):
    for overrides in ({"b": {"epochs": 2}}, {"a": {"epoch": 2}}):
        with pytest.raises(ValueError, match=r"'b'.: no transformation|'epoch'"):
            race_on_task(task, {"a": gx.sgd(0.1)}, epochs=1, overrides=overrides)


def test_a_run_ends_after_its_seconds(task, monkeypatch):
    clock = iter(range(10**6))  # each reading is a second after the one before
    monkeypatch.setattr(lab_train.time, "perf_counter", lambda: float(next(clock)))
    settings = {"epochs": 9, "batch_size": 16, "max_seconds": 3.0}
    entries = {"a": gx.sgd(0.1), "b": gx.sgd(0.1)}
    result = race_on_task(task, entries, **settings, overrides={"b": {"max_seconds": 1.5}})
    seconds = [[row["seconds"] for row in history.rows] for history in result.histories]
    assert seconds == [[1, 2, 3, 4], [1, 2]]
    assert not any(history.diverged for history in result.histories)


def test_a_diverged_run_stops_and_comes_last(task):
    entries = {"bad": optax.chain(gx.sgd(1.0), optax.scale(math.nan)), "good": gx.sgd(0.1)}
    result = race_on_task(task, entries, epochs=4, batch_size=16)
    bad, good = result.histories
    assert bad.diverged
    assert len(bad.rows) < 4
    assert not good.diverged
    assert len(good.rows) == 4
    assert [h.label for h in ranked(result)] == ["good", "bad"]


def test_ranking_is_by_training_loss(task):
    entries = {"slow": gx.sgd(0.001), "fast": gx.sgd(1.0), "middling": gx.sgd(0.1)}
    result = race_on_task(task, entries, epochs=3, batch_size=16)
    assert [h.label for h in ranked(result)] == ["fast", "middling", "slow"]
    assert [h.label for h in result.histories] == list(entries)


def test_every_row_is_told_as_it_comes(task):
    told = []
    entries = {"a": gx.sgd(0.1), "b": gx.sgd(0.2)}
    result = race_on_task(
        task, entries, epochs=2, batch_size=16, on_row=lambda *row: told.append(row)
    )
    assert told == [(h.label, row) for h in result.histories for row in h.rows]


def test_an_epoch_is_one_program(task):
    traces = []

    def init(params):
        return ()

    def update(updates, state, params=None, **extra):
        traces.append(1)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    tx = optax.GradientTransformationExtraArgs(init, update)
    race_on_task(task, {"a": tx}, epochs=5, batch_size=8)
    assert len(traces) <= 2  # the scan's body, which JAX may trace twice to fix its types


def test_a_resumed_run_is_the_uninterrupted_one(noisy):
    tx, train = gx.adam(0.01), to_device(noisy.train)
    epoch = jax.jit(make_epoch(noisy, tx, batch_size=16))
    state = init_state(tx, noisy.init(jax.random.key(0)), jax.random.key(1))
    for _ in range(2):
        state, _ = epoch(state, train)
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    expected, got = epoch(state, train), epoch(restored, train)
    jax.tree.map(np.testing.assert_array_equal, expected, got)


def test_hyperparameters_sweep_in_one_program(noisy):
    train, params = to_device(noisy.train), noisy.init(jax.random.key(0))
    key = jax.random.key(1)

    def run(rate):
        tx = gx.momentum(rate, 0.9)
        return make_epoch(noisy, tx, batch_size=16)(init_state(tx, params, key), train)[1].cost

    rates = jnp.asarray([0.001, 0.01, 0.1])
    swept = jax.jit(jax.vmap(run))(rates)
    alone = [jax.jit(run)(rate) for rate in rates]
    np.testing.assert_allclose(swept, alone, rtol=1e-5)


def test_the_state_is_donated(task):
    tx, train = gx.momentum(0.1), to_device(task.train)
    params = task.init(jax.random.key(0))
    epoch = jax.jit(make_epoch(task, tx, batch_size=16), donate_argnums=0)
    state = init_state(tx, params, jax.random.key(1))
    new, result = epoch(state, train)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, new, result)))


def test_the_images_stay_bytes(task):
    assert to_device(task.train).x.dtype == jnp.uint8


def test_an_autoencoder_has_no_accuracy():
    task = make_task(dataset(), "autoencoder", model_options={"widths": [6, 2]})
    (history,) = race_on_task(task, {"a": gx.adam(0.01)}, epochs=2, batch_size=16).histories
    metrics = {f"{part}_{metric}" for part in ("train", "test") for metric in ("loss", "error")}
    work = {"epoch", "step", "seconds", "gradients", "cost", "steps_per_second"}
    assert set(history.rows[0]) == work | metrics


def test_evaluate_is_exact_for_one_block(task):
    params = task.init(jax.random.key(0))
    means = evaluate(task, params, to_device(task.test))
    batch = Batch(task.test.x, task.test.y, jnp.ones(20))
    expected = {name: float(total) / 20 for name, total in task.metrics(params, batch).items()}
    assert {k: float(v) for k, v in means.items()} == pytest.approx(expected)


def config(**changes):
    return parse_config(
        {
            "name": "trial",
            "task": {"kind": "classification", "dataset": "digits", "model": "logistic"},
            "training": {"epochs": 1, "batch_size": 16},
            "optimizers": {"sgd": {"method": "sgd", "learning_rate": 0.1}},
        }
        | changes
    )


def test_a_config_is_raced_as_it_says():
    data = dataset()
    experiment = config(seed=5, training={"epochs": 2, "batch_size": 16, "order": "sequential"})
    (history,) = race(experiment, data).histories
    settings = {"epochs": 2, "batch_size": 16, "order": "sequential", "seed": 5}
    task = make_task(data, "logistic")
    (expected,) = race_on_task(task, {"sgd": gx.sgd(0.1)}, **settings).histories
    assert [r["cost"] for r in history.rows] == [r["cost"] for r in expected.rows]
    override = {"epochs": 3, "max_seconds": 1000}
    training = {"epochs": 2, "batch_size": 16, "overrides": {"sgd": override}}
    (longer,) = race(config(seed=5, training=training), data).histories
    assert len(longer.rows) == 3


def test_a_race_reads_its_data():
    given, read = race(config(), load("digits")), race(config())
    assert [row["cost"] for history in read.histories for row in history.rows] == [
        row["cost"] for history in given.histories for row in history.rows
    ]


def test_all_optimizers_that_cannot_be_built_are_named():
    refused = {"method": "rmsprop", "learning_rate": 0.1, "nesterov": True}  # but no momentum
    entries = {"a": refused, "good": {"method": "adam"}, "b": refused}
    with pytest.raises(ConfigError) as caught:
        race(config(optimizers=entries), dataset())
    assert [problem.path for problem in caught.value.problems] == [
        "optimizers.a.nesterov",
        "optimizers.b.nesterov",
    ]


def test_an_optimizer_that_does_not_fit_is_named_before_any_training():
    def update(updates, state, params=None):
        raise ValueError("needs a blue moon")

    told = []
    entries = {"good": gx.sgd(0.1), "bad": optax.GradientTransformation(lambda p: (), update)}
    task = make_task(dataset(), "logistic")
    with pytest.raises(ConfigError, match=r"optimizers\.bad: needs a blue moon"):
        race_on_task(task, entries, epochs=1, on_row=lambda *row: told.append(row))
    assert told == []


def test_a_surface_is_walked_down():
    surface = SURFACES["rosenbrock"]
    walk = make_walk(surface.fn, gx.nesterov(1e-3), 5)
    points, values = walk(jnp.asarray(surface.start))
    x, tx = jnp.asarray(surface.start), gx.nesterov(1e-3)
    state = tx.init(x)
    for point, value in zip(points, values, strict=True):
        theta = gx.eval_params(state, x)
        np.testing.assert_allclose(point, theta, rtol=1e-5)
        assert float(value) == pytest.approx(float(surface.fn(theta)), rel=1e-5)
        updates, state = tx.update(jax.grad(surface.fn)(x), state, x)
        x = optax.apply_updates(x, updates)


def test_a_surface_race_has_a_row_a_step():
    told = []
    task = {"kind": "surface", "surface": "quadratic", "start": [1.0, 2.0]}
    entries = {
        "good": {"method": "sgd", "learning_rate": 0.01},
        "bad": {"method": "sgd", "learning_rate": 1e20},
    }
    experiment = config(task=task, training={"steps": 4}, optimizers=entries)
    result = race(experiment, on_row=lambda *row: told.append(row))
    good, bad = result.histories
    assert good.rows[0] == {
        "step": 0,
        "value": pytest.approx(float(SURFACES["quadratic"].fn(jnp.asarray([1.0, 2.0])))),
        "x0": 1.0,
        "x1": 2.0,
    }
    assert [row["step"] for row in good.rows] == [0, 1, 2, 3, 4]
    assert good.params == pytest.approx([good.rows[-1]["x0"], good.rows[-1]["x1"]])
    assert bad.diverged
    assert len(bad.rows) < 5
    assert all(math.isfinite(v) for row in bad.rows[:-1] for v in row.values())
    assert [h.label for h in ranked(result)] == ["good", "bad"]
    assert told == [("good", row) for row in good.rows] + [("bad", row) for row in bad.rows]


def test_a_surface_starts_where_it_likes_best():
    surface = SURFACES["beale"]
    entries = {"sgd": gx.sgd(0.01)}
    experiment = config(task={"kind": "surface", "surface": "beale"}, training={"steps": 1})
    first = race(experiment).histories[0].rows[0]
    same = race_on_surface(surface, entries, start=surface.start, steps=1).histories[0].rows[0]
    assert first == same
    assert (first["x0"], first["x1"]) == surface.start


def test_an_online_batch_is_no_larger_than_the_set(task):
    def run(batch_size):
        options = {"epochs": 1, "batch_size": batch_size, "order": "online"}
        return race_on_task(task, {"a": gx.sgd(0.1)}, **options).histories[0].rows[0]["cost"]

    assert run(10**6) == run("full")


def test_a_loss_that_ran_away_has_diverged(task):
    """At any scale: what counts is the loss at the start, which all optimisers share."""
    options = {"epochs": 3, "batch_size": 16}
    for scale in (1.0, 1e-6, 1e6):
        scaled = task._replace(
            metrics=lambda *args, scale=scale: {
                name: scale * x for name, x in task.metrics(*args).items()
            },
        )
        wild = {"good": gx.sgd(0.1), "wild": optax.sgd(-1e4)}  # which climbs
        good, wild = race_on_task(scaled, wild, **options).histories
        assert not good.diverged
        assert math.isfinite(wild.rows[-1]["train_loss"])
        assert wild.diverged
        assert len(wild.rows) == 3  # it may come back
    result = RaceResult("x", "train_loss", (wild, good), "nats")
    assert ranked(result) == (good, wild)


def test_a_value_that_ran_away_has_diverged():
    methods = {"good": gx.sgd(1e-3), "wild": gx.sgd(0.05)}
    surface = SURFACES["quadratic"]
    good, wild = race_on_surface(surface, methods, start=(-4.6, -2.2), steps=20).histories
    assert not good.diverged
    assert math.isfinite(wild.rows[-1]["value"])
    assert wild.rows[-1]["value"] > 100 * wild.rows[0]["value"]
    assert wild.diverged


def test_no_clock_counts_the_first_run_of_a_quick_program(task, monkeypatch):
    """A quick first epoch is run twice and timed the second time, to the same numbers."""

    def raced(*elapsed):
        times = iter(elapsed)
        monkeypatch.setattr(lab_train, "of_first", lambda *_: next(times))
        (history,) = race_on_task(task, {"a": gx.adam(0.1)}, epochs=2, batch_size=16).histories
        assert next(times, None) is None
        return history.rows

    quick, dear = raced(0.1, 0.01, 0.02), raced(0.3, 0.02)
    assert [row["seconds"] for row in quick] == pytest.approx([0.01, 0.03])
    assert [row["seconds"] for row in dear] == pytest.approx([0.3, 0.32])
    for name in ("cost", "train_loss", "gradients", "step"):
        assert [row[name] for row in quick] == [row[name] for row in dear]
