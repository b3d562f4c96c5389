"""The data sets: what is read is right, what is wrong is refused, nothing is half-cached."""

import gzip
import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pooch
import pytest
import requests

from gradxform.lab.data import downloads, formats
from gradxform.lab.data import sets as data
from gradxform.lab.data.sets import DataError, Split, hold_out, load

REAL = os.environ.get("GRADXFORM_DATA", "")  # before a fixture hides it
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def cifar(labels, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8)
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("GRADXFORM_DATA", raising=False)


# Parsing


def test_idx_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    split = formats.parse_mnist(idx(images), idx([7, 0, 9]), ("images", "labels"))
    np.testing.assert_array_equal(split.x, images)
    np.testing.assert_array_equal(split.y, [7, 0, 9])
    assert split.x.dtype == np.uint8
    assert split.y.dtype == np.int32


GOOD = idx(np.zeros((2, 3, 3)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", idx([1, 2]), "a: expected an IDX header of 16 bytes, found 0 bytes"),
        (GOOD[:15], idx([1, 2]), "a: expected an IDX header of 16 bytes, found 15 bytes"),
        (idx([1, 2] * 9), idx([1, 2]), "a: expected magic number 2051 .*, found 2049"),
        (b"\x89PNG" + GOOD[4:], idx([1, 2]), "a: expected magic number 2051"),
        (GOOD[:-1], idx([1, 2]), r"a: expected 34 bytes for shape \(2, 3, 3\), found 33 bytes"),
        (GOOD + b"!", idx([1, 2]), r"a: expected 34 bytes for shape \(2, 3, 3\), found 35 bytes"),
        (GOOD, GOOD, "b: expected magic number 2049 .*, found 2051"),
        (GOOD, idx([1, 10]), r"b: expected labels from 0 to 9, found 10 \(example 1\)"),
        (GOOD, idx([1, 2, 3]), "b: expected 2 labels, one for each image of a, found 3"),
    ],
)
def test_idx_refusals(images, labels, message):
    with pytest.raises(DataError, match=message):
        formats.parse_mnist(images, labels, ("a", "b"))


def test_idx_sizes_do_not_overflow():
    header = struct.pack(">4I", 0x803, 2**31, 2**31, 4)  # 2^64 bytes: 0 modulo 2^64
    with pytest.raises(DataError, match="expected 18446744073709551632 bytes"):
        formats.parse_idx(header, "a", 3)


def test_cifar_planes_become_channels():
    content = cifar([3, 9])
    split = formats.parse_cifar10(content, "batch")
    assert split.x.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(split.y, [3, 9])
    record, row, column, channel = 1, 5, 17, 2
    offset = record * 3073 + 1 + channel * 1024 + row * 32 + column
    assert split.x[record, row, column, channel] == content[offset]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "batch: expected .* 3073 bytes, found 0 bytes: 0 records and 0 bytes"),
        (cifar([1, 2])[:-5], "batch: expected .* found 6141 bytes: 1 records and 3068 bytes"),
        (cifar([1, 200]), "batch: expected labels from 0 to 9, found 200"),
    ],
)
def test_cifar_refusals(content, message):
    with pytest.raises(DataError, match=message):
        formats.parse_cifar10(content, "batch")


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


PACKED = gzip.compress(np.random.default_rng(0).bytes(1000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "x.gz: expected a gzip file"),
        (PACKED[:-9], "x.gz: expected a whole gzip file, found a truncated"),
        (PACKED[:500], "x.gz: expected a whole gzip file, found a truncated"),
        (flip(PACKED, 500), "x.gz: expected .*gzip file"),
    ],
)
def test_gzip_refusals(content, message):
    with pytest.raises(DataError, match=message):
        formats.decompress(content, "x.gz", 10**6)


# Digits, splits


def test_digits_are_all_there_once():
    digits = load("digits")
    assert (digits.num_classes, digits.scale) == (10, 16.0)
    assert digits.train.x.dtype == np.uint8
    assert digits.train.y.dtype == np.int32
    from sklearn.datasets import load_digits

    original = load_digits()
    rows = np.concatenate([digits.train.x, digits.test.x]).reshape(-1, 64)
    labels = np.concatenate([digits.train.y, digits.test.y])
    ours = np.column_stack([rows, labels])
    theirs = np.column_stack([original.data, original.target])
    assert sorted(map(bytes, ours.astype(np.uint8))) == sorted(map(bytes, theirs.astype(np.uint8)))
    # Shuffled: every class is about as frequent in both parts.
    np.testing.assert_allclose(np.bincount(digits.test.y) / 360, 0.1, atol=0.04)
    assert not np.array_equal(labels, original.target)


def test_digits_are_the_same_each_time():
    x = np.concatenate([load("digits").train.x, load("digits").test.x])
    assert sha256(x.tobytes())[:16] == "84c023338ac6dff3"


@pytest.mark.parametrize(("n", "fraction", "kept"), [(60_000, 0.1, 54_000), (7, 0.5, 3)])
def test_hold_out_takes_the_last_as_keras_does(n, fraction, kept):
    split = Split(np.zeros((n, 1, 1), np.uint8), np.arange(n, dtype=np.int32))
    train, validation = hold_out(split, fraction)
    np.testing.assert_array_equal(train.y, np.arange(kept))
    np.testing.assert_array_equal(validation.y, np.arange(kept, n))
    assert len(validation.x) == n - kept


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 0.95, 1e-20, float("nan")])
def test_hold_out_refuses(fraction):
    split = Split(np.zeros((10, 1, 1), np.uint8), np.arange(10, dtype=np.int32))
    with pytest.raises(DataError, match=f"validation split.* {fraction}"):
        hold_out(split, fraction)


def test_unknown_name():
    with pytest.raises(DataError, match=r"'fashion-mnist'.*digits, mnist.*did you mean fashion_mn"):
        load("fashion-mnist")


# Folders


@pytest.fixture
def tiny_mnist(monkeypatch):
    """A stand-in for MNIST of six training and two test images, pinned like the original."""
    rng = np.random.default_rng(1)
    files = {
        IMAGES: idx(rng.integers(0, 256, (6, 4, 4))),
        LABELS: idx(np.arange(6)),
        TEST_IMAGES: idx(rng.integers(0, 256, (2, 4, 4))),
        TEST_LABELS: idx([1, 2]),
    }
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    mnist = downloads.SOURCES["mnist"]._replace(
        downloads={name: sha256(content) for name, content in packed.items()},
        contents={name: sha256(content) for name, content in files.items()},
    )
    monkeypatch.setitem(downloads.SOURCES, "mnist", mnist)
    monkeypatch.setattr(data, "_MNIST_SHAPES", {"train": (6, 4, 4), "t10k": (2, 4, 4)})
    return files, packed


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("sub", [".", "mnist"])
@pytest.mark.parametrize("kind", ["plain", "gz", "recompressed"])
def test_mnist_from_a_folder(tiny_mnist, tmp_path, sub, kind):
    files, packed = tiny_mnist
    recompressed = {f"{name}.gz": gzip.compress(c, 1, mtime=9) for name, c in files.items()}
    write(tmp_path / sub, {"plain": files, "gz": packed, "recompressed": recompressed}[kind])
    mnist = load("mnist", tmp_path)
    np.testing.assert_array_equal(mnist.train.y, np.arange(6))
    assert idx(mnist.test.x) == files[TEST_IMAGES]
    assert mnist.scale == 255.0


def test_environment_names_the_folder_and_the_argument_beats_it(tiny_mnist, tmp_path, monkeypatch):
    files, _ = tiny_mnist
    write(tmp_path / "good", files)
    monkeypatch.setenv("GRADXFORM_DATA", str(tmp_path / "good"))
    assert len(load("mnist").train.y) == 6
    with pytest.raises(DataError, match="nowhere is not a folder; --data-dir or GRADXFORM_DATA"):
        load("mnist", tmp_path / "nowhere")


def test_changed_pixel_is_refused(tiny_mnist, tmp_path):
    files, _ = tiny_mnist
    write(tmp_path, files | {TEST_IMAGES: flip(files[TEST_IMAGES], 20)})
    with pytest.raises(DataError, match=f"{TEST_IMAGES}: expected the original's content, SHA-256"):
        load("mnist", tmp_path)


def test_wrong_count_is_refused(tiny_mnist, tmp_path):
    files, _ = tiny_mnist
    write(tmp_path, files | {IMAGES: idx(np.zeros((5, 4, 4))), LABELS: idx(np.zeros(5))})
    with pytest.raises(DataError, match=rf"{IMAGES}: expected images of shape \(6, 4, 4\), found"):
        load("mnist", tmp_path)


def test_truncated_gzip_in_a_folder_is_refused(tiny_mnist, tmp_path):
    _, packed = tiny_mnist
    write(tmp_path, packed | {f"{LABELS}.gz": packed[f"{LABELS}.gz"][:-4]})
    with pytest.raises(DataError, match=rf"{LABELS}.gz: expected a whole gzip file"):
        load("mnist", tmp_path)


def test_missing_file_is_named(tiny_mnist, tmp_path):
    files, _ = tiny_mnist
    write(tmp_path, {IMAGES: files[IMAGES]})
    with pytest.raises(DataError, match=f"lacks {LABELS}, {TEST_IMAGES}, {TEST_LABELS}: expected"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_empty_folder(name, tmp_path):
    with pytest.raises(DataError, match=f"holds no file of {name}: expected .*plain or .gz"):
        load(name, tmp_path)


def test_mnist_is_not_taken_for_fashion_mnist(tiny_mnist, tmp_path, caplog):
    files, _ = tiny_mnist
    write(tmp_path, files)
    with pytest.raises(DataError, match="expected a file of fashion_mnist, found MNIST's"):
        load("fashion_mnist", tmp_path)
    write(tmp_path / "fashion-mnist", {name: flip(c, len(c) - 1) for name, c in files.items()})
    files[LABELS] = idx(np.arange(6)[::-1])
    files[TEST_LABELS] = idx([3, 4])
    write(tmp_path / "fashion-mnist", {name: files[name] for name in (LABELS, TEST_LABELS)})
    with caplog.at_level("WARNING"):
        fashion = load("fashion_mnist", tmp_path)
    warning = caplog.messages[-1]
    assert "not the original .gz files of fashion_mnist" in warning
    assert IMAGES in warning
    assert (fashion.name, len(fashion.train.y)) == ("fashion_mnist", 6)


@pytest.mark.parametrize("original", [True, False])
def test_the_original_gz_files_of_fashion_mnist_are_known(
    tiny_mnist, tmp_path, monkeypatch, caplog, original
):
    files, _ = tiny_mnist
    files = {name: flip(c, len(c) - 1) if "idx3" in name else c for name, c in files.items()}
    files |= {LABELS: idx(np.arange(6)[::-1]), TEST_LABELS: idx([3, 4])}
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    digests = {name: sha256(content) for name, content in packed.items()}
    pinned = downloads.SOURCES["fashion_mnist"]._replace(downloads=digests)
    monkeypatch.setitem(downloads.SOURCES, "fashion_mnist", pinned)
    if not original:
        packed[f"{LABELS}.gz"] = gzip.compress(files[LABELS], 1, mtime=9)
    write(tmp_path, packed)
    with caplog.at_level("WARNING"):
        load("fashion_mnist", tmp_path)
    told = [message.rpartition(": ")[2] for message in caplog.messages]
    assert told == ([] if original else [f"{LABELS}.gz"])


@pytest.mark.parametrize("sub", [".", "cifar10", "cifar-10-batches-bin", "cifar10_subset"])
def test_part_of_cifar_will_do(tmp_path, sub):
    files = {
        "data_batch_4.bin.gz": gzip.compress(cifar([4])),
        "data_batch_2.bin": cifar([2, 3]),
        "test_batch.bin": cifar([9]),
    }
    write(tmp_path / sub, files)
    dataset = load("cifar10", tmp_path)
    np.testing.assert_array_equal(dataset.train.y, [2, 3, 4])
    assert dataset.train.x.shape == (3, 32, 32, 3)
    assert dataset.test.x.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data_batch_1.bin": cifar([1])}, "lacks .*test_batch.bin"),
        ({"test_batch.bin": cifar([1])}, "lacks data_batch_1.bin"),
        (
            {"data_batch_1.bin": cifar([1])[:-1], "test_batch.bin": cifar([1])},
            "data_batch_1.bin: expected one or more whole records",
        ),
    ],
)
def test_unusable_parts_of_cifar(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(DataError, match=message):
        load("cifar10", tmp_path)


def test_whole_cifar_batch_must_be_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CIFAR10_BATCH", 2 * formats.CIFAR10_RECORD)
    write(tmp_path, {"data_batch_1.bin": cifar([1, 2]), "test_batch.bin": cifar([1])})
    with pytest.raises(DataError, match=r"data_batch_1.bin: expected .* SHA-256 cee916563c9f"):
        load("cifar10", tmp_path)


@pytest.mark.skipif(not REAL, reason="GRADXFORM_DATA is not set")
def test_real_mnist():
    mnist = load("mnist", REAL)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    np.testing.assert_array_equal(np.bincount(mnist.train.y), counts)
    assert mnist.train.x.mean() == pytest.approx(33.318, abs=1e-3)
    assert mnist.test.x.shape == (10_000, 28, 28)


# Damage


def damaged(content, rng):
    """One bit flipped, or an end cut off."""
    at = rng.randrange(len(content))
    if rng.random() < 0.3:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def refusal(name, folder):
    try:
        load(name, folder)
    except DataError as error:
        return str(error)
    return None


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip((*a[1], *a[2]), (*b[1], *b[2]), strict=True))


@pytest.mark.parametrize(
    ("name", "packed"),
    # of the plain files of Fashion-MNIST no digests are published
    [(name, True) for name in downloads.SOURCES] + [("mnist", False), ("cifar10", False)],
)
def test_no_damage_is_taken_for_data(tiny_mnist, tmp_path, monkeypatch, name, packed):
    """Each is refused with the file's name, unless it is in a header of gzip that says nothing."""
    if name == "cifar10":
        files = {f"data_batch_{i}.bin": cifar([i, i], seed=i) for i in range(1, 6)}
        files["test_batch.bin"] = cifar([0, 9])
        digests = {file: sha256(content) for file, content in files.items()}
        pinned = downloads.SOURCES["cifar10"]._replace(contents=digests)
        monkeypatch.setitem(downloads.SOURCES, "cifar10", pinned)
        monkeypatch.setattr(data, "_CIFAR10_BATCH", 2 * formats.CIFAR10_RECORD)
    else:
        files, _ = tiny_mnist
    if name == "fashion_mnist":
        files = {file: flip(content, len(content) - 1) for file, content in files.items()}
        files |= {LABELS: idx(np.arange(6)[::-1]), TEST_LABELS: idx([3, 4])}
    if packed:
        files = {f"{file}.gz": gzip.compress(c, mtime=0) for file, c in files.items()}
    write(tmp_path, files)
    whole = load(name, tmp_path)
    rng, refused = random.Random(0), 0
    for _ in range(100):
        file = rng.choice(sorted(files))
        write(tmp_path, {file: damaged(files[file], rng)})
        told = refusal(name, tmp_path)
        assert str(tmp_path / file) in told if told else same(load(name, tmp_path), whole)
        refused += bool(told)
        write(tmp_path, {file: files[file]})
    assert refused >= (80 if packed else 100)


# Downloads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(downloads, "cache_dir", lambda: folder)
    return folder


@pytest.fixture
def web(monkeypatch):
    """Stands in for the network: address -> content; the addresses asked for are kept."""

    class Web(dict[str, bytes]):
        asked: tuple[str, ...] = ()

    pages = Web()

    def downloader(**_):
        def fetch(url, output_file, _):
            pages.asked += (url,)
            if url not in pages:
                raise requests.exceptions.ConnectionError("no route to host")
            with open(output_file, "wb") as file:
                file.write(pages[url])

        return fetch

    monkeypatch.setattr(pooch, "HTTPDownloader", downloader)
    return pages


FIRST, SECOND = downloads.SOURCES["mnist"].mirrors


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_download_fills_the_cache_once(tiny_mnist, cache, web):
    _, packed = tiny_mnist
    web.update({FIRST + name: content for name, content in packed.items()})
    np.testing.assert_array_equal(load("mnist").train.y, np.arange(6))
    assert files_in(cache) == sorted(packed)
    assert len(web.asked) == 4
    web.clear()
    assert len(load("mnist").test.y) == 2
    assert len(web.asked) == 4


def test_second_mirror_is_tried(tiny_mnist, cache, web):
    _, packed = tiny_mnist
    web.update({SECOND + name: content for name, content in packed.items()})
    web[FIRST + f"{IMAGES}.gz"] = b"<html>moved</html>"
    assert len(load("mnist").train.y) == 6
    assert web.asked[:2] == (FIRST + f"{IMAGES}.gz", SECOND + f"{IMAGES}.gz")
    assert files_in(cache) == sorted(packed)


def test_wrong_digest_leaves_nothing_behind(tiny_mnist, cache, web):
    _, packed = tiny_mnist
    web.update({FIRST + name: content[:-1] for name, content in packed.items()})
    found = sha256(packed[f"{IMAGES}.gz"][:-1])
    with pytest.raises(DataError, match=rf"{IMAGES}.gz of mnist .*\n.*expected.* got {found}"):
        load("mnist")
    assert files_in(cache) == []


def test_broken_connection_leaves_nothing_behind(tiny_mnist, cache, web, monkeypatch):
    def downloader(**_):
        def fetch(_url, output_file, _):
            with open(output_file, "wb") as file:
                file.write(b"half")
            raise requests.exceptions.ChunkedEncodingError("connection broken")

        return fetch

    monkeypatch.setattr(pooch, "HTTPDownloader", downloader)
    with pytest.raises(DataError, match="connection broken"):
        load("mnist")
    assert files_in(cache) == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_no_network_names_the_way_out(name, cache, web):
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    for part in (name, *web.asked, "no route to host", "--data-dir", "GRADXFORM_DATA", str(cache)):
        assert part in message
    assert all(url.startswith("https://") for url in web.asked)
    assert ("test_batch.bin" if name == "cifar10" else TEST_LABELS) in message


def test_damaged_cache_is_downloaded_again(tiny_mnist, cache, web):
    _, packed = tiny_mnist
    web.update({FIRST + name: content for name, content in packed.items()})
    load("mnist")
    (cache / "mnist" / f"{LABELS}.gz").write_bytes(b"damaged")
    np.testing.assert_array_equal(load("mnist").train.y, np.arange(6))
    assert len(web.asked) == 5


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CIFAR_MEMBERS = {
    f"cifar-10-batches-bin/{name}": cifar([i])
    for i, name in enumerate(downloads.SOURCES["cifar10"].contents)
}


def serve_cifar(content, web, monkeypatch):
    source = downloads.SOURCES["cifar10"]
    pinned = source._replace(downloads={"cifar-10-binary.tar.gz": sha256(content)})
    monkeypatch.setitem(downloads.SOURCES, "cifar10", pinned)
    web[source.mirrors[0] + "cifar-10-binary.tar.gz"] = content


def test_cifar_archive_is_read_by_name(tmp_path, cache, web, monkeypatch):
    serve_cifar(archive(CIFAR_MEMBERS | {"../../escaped": b"x"}), web, monkeypatch)
    dataset = load("cifar10")
    np.testing.assert_array_equal(dataset.train.y, np.arange(5))
    np.testing.assert_array_equal(dataset.test.y, [5])
    assert files_in(tmp_path) == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize(
    "content",
    [
        archive({k: v for k, v in CIFAR_MEMBERS.items() if "batch_3" not in k}),
        archive(CIFAR_MEMBERS)[:2000],
        b"not an archive",
    ],
    ids=["member missing", "truncated", "no archive"],
)
def test_bad_cifar_archive(cache, web, monkeypatch, content):
    serve_cifar(content, web, monkeypatch)
    expected = r"cifar-10-binary.tar.gz: expected an? (archive with data_b|(whole )?gzip file)"
    with pytest.raises(DataError, match=expected):
        load("cifar10")


def test_errors_do_not_wait_for_jax():
    program = (
        "import sys\nfrom gradxform.lab.data import sets as data\n"
        "try:\n    data.load('mnits')\nexcept data.DataError:\n    print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"
