"""Data of the user's own: columns of files, and arrays of registered functions."""

import csv
import os
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest

import gradxform.lab as lab
from gradxform.lab.data import tables
from gradxform.lab.data.formats import DataError
from gradxform.lab.data.own import from_file, from_function
from gradxform.lab.data.sets import checksum
from gradxform.lab.experiment import registry

ROWS = "size,rooms,price\n" + "".join(f"{i}.5,{i % 3},{10 * i}\n" for i in range(20))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    registry.forget()


def save(text: str | bytes, name: str = "data.csv") -> str:
    with open(name, "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
    return name


def price(file: str = "data.csv", target: str = "price", **options):
    return from_file(file, target, **({"is_regression": True} | options))


def test_columns_become_inputs_and_target():
    save(ROWS)
    data = price(test_split=0.2)
    assert data.train.x.shape == (16, 2)
    assert data.train.x.dtype == np.float32
    assert (data.test.x.shape, data.num_classes) == ((4, 2), 0)
    every = np.concatenate([data.train.y, data.test.y])
    assert sorted(every) == [10.0 * i for i in range(20)]
    np.testing.assert_allclose(data.train.x[:, 0], data.train.y / 10 + 0.5)  # rows stay together
    assert price(inputs=["rooms"]).train.x.shape == (16, 1)
    assert price(test_split=0.0).test is None


def test_the_split_depends_on_its_seed_alone():
    save(ROWS)
    assert checksum(price()) == checksum(price()) != checksum(price(split_seed=1))


@pytest.mark.parametrize("seed", [0, 1])
def test_data_from_numpys_generator_of_the_same_seed_are_not_split_by_their_values(seed):
    values = np.random.default_rng(seed).uniform(size=1000)
    save("x,price\n" + "".join(f"{x},{x}\n" for x in values))
    data = price(split_seed=seed)
    assert abs(data.test.y.mean() - data.train.y.mean()) < 0.1  # four standard deviations


def test_texts_are_classes_in_sorted_order():
    save("x,kind\n1,cat\n2,dog\n3,ant\n4,cat\n")
    data = price(target="kind", is_regression=False, test_split=0.0)
    assert data.num_classes == 3
    assert sorted(zip(data.train.x[:, 0].tolist(), data.train.y.tolist(), strict=True)) == [
        *((1.0, 1), (2.0, 2), (3.0, 0), (4.0, 1))
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_common_forms_of_csv(delimiter):
    text = '"a, b; c","y"\r\n1,2\r\n\r\n"3",4\r\n'.replace(",", delimiter)
    save("\ufeff" + text.replace(f"a{delimiter} b; c", "a b c"))
    assert price(target="y", test_split=0.0).train.x.shape == (2, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "size,price\n1,2\nbig,3\n",
            "data.csv, line 3, column 'size': expected a number, found 'big'; correct it, or name "
            "the columns to use in task.inputs",
        ),
        (
            "size;price\n1,5;2\n",
            "data.csv, line 2, column 'size': expected a number, found '1,5'; write the decimal",
        ),
        ("size,price\n1,2\n,3\n", "data.csv, line 3, column 'size': the value is missing"),
        ("size,price\n1,nan\n", "data.csv, line 2, column 'price': the value is missing"),
        ("size,price\n1,inf\n", "data.csv, line 2, column 'price': expected a finite number"),
        ("size,price\n\n1,2\n3\n", "data.csv, line 4: 1 values where the first line has 2 names"),
        ("size,pric\n1,2\n", "task.target: there is no column 'price', did you mean 'pric'?"),
        ("a,b\n1,2\n", "task.target: there is no column 'price'; the columns are a, b"),
        ("price\n1\n", "data.csv: there is no column but the target 'price'"),
        ("price,price\n1,2\n", "data.csv, line 1: two columns are named 'price'"),
        ("1,2\n3,4\n", "data.csv, line 1: should name the columns, found numbers"),
        ("size,\n1,2\n", "data.csv, line 1: a column has no name"),
        ("", "data.csv: is empty; the first line should name the columns"),
        ("size,price\n", "data.csv: holds no line of data"),
        (b"size,price\n\xff,1\n", "data.csv: not text in UTF-8"),
        ('size,price\n"1"2,3\n', "data.csv, line 2: not CSV"),
        (
            "size,price\n1,2\n3,4\n",
            "task.test_split = 0.2 leaves none of 2 examples to test on: give more",
        ),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_told_with_line_and_column(text, told):
    save(text)
    with pytest.raises(DataError) as caught:
        price()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_field_or_a_strange_name_is_one_short_line():
    save("size,price\n" + "x" * 10**5 + ",3\n")
    with pytest.raises(DataError) as caught:
        price()
    assert len(str(caught.value)) < 200
    csv.field_size_limit(10**5)
    save('"a\x1b[2J\nb",price\n?,1\n')
    with pytest.raises(DataError, match=r"column 'a\\\\x1b\[2J\\\\nb'"):
        price()


def test_a_number_is_no_class_by_mistake():
    save("a,b\n1,2\n1,2\n")
    with pytest.raises(DataError, match=r'has 1 different values .*kind = "regression"'):
        price(target="b", is_regression=False, test_split=0.0)
    save(ROWS)
    with pytest.raises(DataError, match="has 20 different values in 20 examples"):
        price(is_regression=False)


def test_arrays_of_an_npz_file():
    images, y = np.zeros((10, 4, 4, 3), np.uint8), np.arange(10) % 2
    np.savez("data.npz", images=images, label=y)
    data = price("data.npz", "label", is_regression=False)
    assert data.train.x.shape == (8, 4, 4, 3)
    np.savez("data.npz", a=np.ones(10), b=np.ones((10, 2)), y=y)
    assert price("data.npz", "y").train.x.shape == (8, 3)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"a": np.ones(3), "y": np.ones(2)}, "equally many rows, found a 3, y 2"),
        ({"a": np.array([{}], object), "y": np.ones(1)}, "not an NPZ file of numbers"),
        (
            {"a": np.array(["x"] * 9), "y": np.ones(9)},
            "data.npz, row 1, column 'a': expected a num",
        ),
    ],
)
def test_what_is_wrong_with_an_npz_file(arrays, told):
    np.savez("data.npz", **arrays)
    with pytest.raises(DataError) as caught:
        price("data.npz", "y")
    assert told in str(caught.value)


def test_files_that_are_not_what_they_say_or_too_large(monkeypatch):
    save(b"PK nonsense", "data.npz")
    with pytest.raises(DataError, match=r"data\.npz: not an NPZ file"):
        price("data.npz")
    save(ROWS)
    np.savez_compressed("zeros.npz", a=np.zeros(10**5), y=np.zeros(10**5))
    monkeypatch.setattr(tables, "LARGEST", 10**4)
    with zipfile.ZipFile("zeros.npz") as archive:
        assert os.path.getsize("zeros.npz") < 10**4 < archive.infolist()[0].file_size
    with pytest.raises(DataError, match=r"zeros\.npz: \d+ bytes, unpacked, more than 10000"):
        price("zeros.npz", "y")
    monkeypatch.setattr(tables, "LARGEST", 10)
    with pytest.raises(DataError, match=r"data\.csv: \d+ bytes, more than 10"):
        price()


def test_a_parquet_file_needs_a_package(monkeypatch):
    save(b"PAR1", "data.parquet")
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"data\.parquet: a Parquet file needs pyarrow: pip install"
    ):
        price("data.parquet")


def test_a_parquet_file():
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": [1.0, 2.0], "y": [3, 4]})
    pytest.importorskip("pyarrow.parquet").write_table(table, "data.parquet")
    assert price("data.parquet", "y", test_split=0.0).train.x.shape == (2, 1)


def test_files_lie_within_the_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    save(ROWS)
    save(ROWS, "inner/near.csv")
    (inner / "out.csv").symlink_to(tmp_path / "data.csv")
    (inner / "loop.csv").symlink_to(inner / "loop.csv")
    (inner / "linked.csv").symlink_to(inner / "near.csv")
    assert price("linked.csv", folder=inner).train.x.shape == (16, 2)
    assert price("inner/near.csv").train.x.shape == (16, 2)
    for file, told in [
        ("out.csv", "is a link that leads out of"),
        ("../data.csv", "should be a path within .*give its folder with --data-dir"),
        (str(tmp_path / "data.csv"), "should be a path within"),
        ("none.csv", "no such file in "),
        ("loop.csv", "cannot be read|no such file"),
        (".", "is not a file"),
        ("a\0.csv", "should be a path within"),
        ("near.xlsx", "no such file"),
    ]:
        with pytest.raises(DataError, match=told):
            price(file, folder=inner)
    if hasattr(os, "mkfifo"):
        os.mkfifo(inner / "pipe.csv")
        with pytest.raises(DataError, match="is not a file"):
            price("pipe.csv", folder=inner)
    with pytest.raises(DataError, match="no such folder"):
        price(folder=tmp_path / "nowhere")


def made(value, **options):
    entry = lab.dataset("mine")(lambda n=3: value(n) if callable(value) else value)
    del entry
    found = registry.find("dataset", "mine")
    return from_function(found, {}, **({"is_regression": True, "test_split": 0.0} | options))


def test_arrays_of_a_function():
    x, y = np.ones((6, 2)), np.arange(6)
    assert made((x, y)).train.x.shape == (6, 2)
    assert made(([1, 2, 3], [4, 5, 6])).train.x.shape == (3, 1)
    both = made(((x, y), (x[:2], y[:2])))
    assert (len(both.train.y), len(both.test.y)) == (6, 2)
    classes = made(((x, ["a", "b", "c"] * 2), (x[:2], ["c", "a"])), is_regression=False)
    assert (classes.num_classes, classes.test.y.tolist()) == (3, [2, 0])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "should return arrays (x, y), or ((x, y), (x_test, y_test)), found int"),
        (([[1], [2, 3]], [1, 2]), "should return arrays"),
        ((["a"], [1]), "x should hold numbers, found <U1"),
        (([1, 2], [1]), "equally many rows, found shapes (2, 1) and (1,)"),
        (([1.0, float("nan")], [1, 2]), "holds a number that is not finite"),
        (lambda n: 1 / 0, "test_own.py, line "),
        (lambda n: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_with_a_function(value, told):
    with pytest.raises(DataError) as caught:
        made(value)
    assert str(caught.value).startswith("data set mine: ")
    assert told in str(caught.value)


def test_reading_data_needs_no_jax():
    assert "gradxform.lab.data.own" in sys.modules
    code = "import gradxform.lab.data.own, sys; print('jax' in sys.modules)"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
