"""What others may have written (configs, archives, checkpoints) is read, never run or followed."""

import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import gradxform
from gradxform.lab.cli import app
from gradxform.lab.data import downloads, formats
from gradxform.lab.data import sets as data
from gradxform.lab.data.sets import DataError
from gradxform.lab.experiment.load import ConfigError, parse_config
from gradxform.lab.training import checkpoints
from gradxform.lab.training.checkpoints import Snapshot, newest, save
from tests.lab.test_fuzz import leaves

# -- the source

SOURCE = Path(gradxform.__file__).parent
TREES = {str(p.relative_to(SOURCE)): ast.parse(p.read_bytes()) for p in SOURCE.rglob("*.py")}
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
IMPORTS = {
    "lazy_names.py",
    "lab/experiment/methods.py",
}  # by name, from a fixed list


def suspicious(node):
    """What in one node of a source could run what it reads."""
    match node:
        case ast.Import(names=names):
            found = {name.name for name in names}
        case ast.ImportFrom(module=module, names=names):
            found = {module, *(f"{module}.{name.name}" for name in names)}
        case ast.Name(id="eval" | "exec" | "compile" | "__import__" as name):
            return name
        case ast.Attribute(attr="system" | "popen" | "mktemp" | "extractall" | "extract" as name):
            return name
        case ast.keyword(arg="allow_pickle" | "shell", value=value) if not (
            isinstance(value, ast.Constant) and value.value is False
        ):
            return node.arg
        case ast.keyword(arg="verify", value=ast.Constant(value=False)):
            return "verify=False"
        case _:
            return None
    return ", ".join(sorted(RUNS_CODE & {name.partition(".")[0] for name in found if name}))


def test_nothing_in_the_package_runs_what_it_reads():
    found = {(f, suspicious(n)) for f, tree in TREES.items() for n in ast.walk(tree)}
    assert not {(file, what) for file, what in found if what}
    importing = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert importing <= IMPORTS


def test_only_the_command_line_has_files_run():
    """One module runs a file, and only the option ``--with`` calls it."""

    def using(names):
        nodes = ((f, n) for f, tree in TREES.items() for n in ast.walk(tree))
        return {file for file, node in nodes if ast.unparse(node) in names}

    assert using({"spec.loader.exec_module", "loader.exec_module"}) == {
        "lab/experiment/own_files.py"
    }
    assert using({"own_files.load"}) == {"lab/cli.py"}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from yaml import load", "eval('1')", "exec(x)", "os.system('ls')"),
        *("np.load(f, allow_pickle=1)", "run(x, shell=True)", "get(u, verify=False)"),
        *("tar.extractall()", "import a, dill.source", "__import__('os')"),
    ],
)
def test_that_test_would_see_it(source):
    assert any(map(suspicious, ast.walk(ast.parse(source))))


def test_addresses_are_https():
    texts = [
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [text for text in texts if re.search(r"\b(http|ftp|file)://", text)]


# -- downloads and archives


def test_every_download_is_pinned():
    for source in downloads.SOURCES.values():
        assert source.mirrors
        assert all(re.fullmatch(r"https://[a-z0-9.-]+/\S*/", mirror) for mirror in source.mirrors)
        digests = [*source.downloads.values(), *filter(None, source.contents.values())]
        assert source.downloads
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
        names = [*source.downloads, *source.contents]
        assert all(re.fullmatch(r"[\w.-]+", name) and ".." not in name for name in names)


NAMES = [f"cifar-10-batches-bin/{name}" for name in downloads.SOURCES["cifar10"].contents]
RECORD = bytes(formats.CIFAR10_RECORD)


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for info, content in members:
            tar.addfile(info, content)
    return buffer.getvalue()


def whole():
    return [member(name, RECORD) for name in NAMES]


def unpack(folder, content):
    """The archive unpacked, once it is seen that nothing came of it outside of memory."""
    file = folder / "cache" / "cifar-10-binary.tar.gz"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    before = sorted(folder.rglob("*"))
    try:
        return downloads._unpack(file, downloads.SOURCES["cifar10"])
    finally:
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/gradxform-escaped", "cifar-10-batches-bin/../../escaped", ".."]
)
def test_no_name_in_an_archive_is_a_path(tmp_path, name):
    found = unpack(tmp_path, archive([member(name, b"x"), *whole(), member(name, b"x")]))
    assert [len(named.content) for named in found.values()] == [len(RECORD)] * 6
    assert not os.path.exists("/tmp/gradxform-escaped")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("target", ["secret", "../secret", "/etc/hostname", NAMES[0], NAMES[1]])
def test_no_link_in_an_archive_is_followed(tmp_path, kind, target):
    (tmp_path / "secret").write_bytes(RECORD)
    link = member(NAMES[0], type=kind, linkname=target)
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz: expected an archive with .*bin"):
        unpack(tmp_path, archive([link, *whole()[1:]]))


def test_damage_to_an_archive_is_told(tmp_path):
    plain, refused = gzip.decompress(archive(whole())), 0
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 512, 150):  # the header of the first member
        changed = bytearray(plain)
        changed[at] = rng.integers(256)
        try:
            unpack(tmp_path, gzip.compress(changed, 1))
        except DataError:
            refused += 1
    assert refused > 50
    many = archive([(member("x", type=tarfile.XHDTYPE, size=0)) for _ in range(3000)])
    with pytest.raises(DataError, match="expected an archive"):
        unpack(tmp_path, many)


@pytest.mark.parametrize("where", ["before", "in", "header"])
def test_a_decompression_bomb_takes_bounded_memory(tmp_path, monkeypatch, where):
    monkeypatch.setattr(downloads, "_LARGEST", 2 * 10**6)
    bomb = bytes(50 * 10**6)
    members = {
        "before": [member("bomb", bomb), *whole()],
        "in": [member(NAMES[0], bomb), *whole()[1:]],
        "header": [member("x", bomb, type=tarfile.XHDTYPE), *whole()],
    }[where]
    content = archive(members)
    assert len(content) < 10**6
    with peak_below(10**7), pytest.raises(DataError, match="expected at most 2000000 bytes"):
        unpack(tmp_path, content)


def test_a_bomb_among_the_files_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_LARGEST", 2 * 10**6)
    for name in downloads.SOURCES["mnist"].contents:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(bytes(50 * 10**6), 1))
    with peak_below(10**7), pytest.raises(DataError, match=r"ubyte.gz: expected at most 2000000 b"):
        data.load("mnist", tmp_path)


class peak_below:
    """Sees to it that what is done within does not take more memory."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < self.limit


def test_the_limit_is_beyond_every_file():
    assert downloads._LARGEST > 60_000 * 28 * 28 + 16
    assert downloads._LARGEST > 6 * (data._CIFAR10_BATCH + 2 * tarfile.RECORDSIZE)


# -- packages

ONE = {"name": "x", "version": "1", "vulns": []}
BUG = {"id": "PYSEC-1", "fix_versions": ["2"]}
SKIPPED = {"name": "y", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        (
            f"print({json.dumps(json.dumps({'dependencies': [ONE, SKIPPED]}))})",
            0,
            "1 of 2 packages",
        ),
        (
            f"print({json.dumps(json.dumps({'dependencies': [ONE | {'vulns': [BUG]}]}))}); exit(1)",
            1,
            "x 1: PYSEC-1, mended in 2\naudit: 1 of 1 packages looked up, 1 known bugs",
        ),
        ("raise OSError('no route')", 0, "audit skipped: pip-audit cannot ask its service (OSE"),
        ("exit(1)", 0, "audit skipped: pip-audit cannot ask its service (no answer)"),
        (None, 0, "audit skipped: pip-audit is not installed"),
    ],
    ids=["nothing found", "found", "no network", "no word", "not installed"],
)
def test_the_audit_fails_for_what_it_finds_alone(tmp_path, program, code, told):
    (tmp_path / "audit.py").write_bytes((Path(__file__).parents[1] / "audit.py").read_bytes())
    if program is not None:
        (tmp_path / "pip_audit.py").write_text(program)
    # without the packages of this environment
    command = [sys.executable, "-S", tmp_path / "audit.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert told in done.stdout


# -- configs

BAD = [
    *("os.system", "subprocess.run", "builtins.eval", "evil", "evil.tx", "evil.sub.tx", "", "."),
    *("optax.__loader__", "optax.__name__", "gradxform.__dict__", "optax.contrib..x", "..optax.x"),
    *(
        "gradxform.lab.cli",
        "gradxform.lab.cli.main",
        "gradxform.lab.training.checkpoints.save",
        "optax.",
    ),
    *("optax._src.base.identity", "optax.contrib._src.x", "optax.contrib.evil", "optax.evil.tx"),
    *("__import__", "__class__", "optax.GradientTransformation", "optax.adam.__globals__", "é.x"),
    *(
        "optax.adam\n",
        "optax/adam",
        "optax:adam",
        "optax.jnp.save",
        "gradxform.optimizers",
        " adam",
    ),
]
TASK = {"kind": "surface", "surface": "saddle"}


def named(name):
    """A config that names it in each place where a name can be."""
    calls = {
        "method": {"method": name},
        "chain": {"chain": [{"method": name}]},
        "rate": {"method": "sgd", "learning_rate": {"schedule": name}},
        "curvature": {"method": "newton_cg", "curvature": name},
        "preconditioner": {"method": "newton_cg", "preconditioner": {"preconditioner": name}},
    }
    return {"name": "x", "task": TASK, "training": {"steps": 1}, "optimizers": calls}


@pytest.mark.parametrize("name", BAD)
def test_a_config_cannot_name_what_is_not_listed(name):
    with pytest.raises(ConfigError) as caught:
        parse_config(named(name))
    places = {problem.path.split(".")[1] for problem in caught.value.problems}
    assert places == {"method", "chain", "rate", "curvature", "preconditioner"}


def test_a_name_imports_nothing(tmp_path):
    (tmp_path / "evil").mkdir()
    for file in ("evil/__init__.py", "evil/sub.py"):
        (tmp_path / file).write_text("open('imported', 'w')\n")
    program = (
        "import sys\n"
        "from gradxform.lab.experiment.load import ConfigError, parse_config\n"
        "from gradxform.lab.experiment.methods import build_all\n"
        "def refused(config):\n"
        "    try:\n        build_all(parse_config(config).optimizers)\n"
        "    except ConfigError:\n        return True\n"
        f"good, bad = {named('hessian')!r}, {[named(name) for name in BAD]!r}\n"
        "assert refused(good)\n"
        "before = set(sys.modules)\n"
        "assert all(map(refused, bad))\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.stdout.strip() == b"[]", done.stderr
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["../x", "..", ".", "/x", "a/b", "a\\b", "a\x00", "-x", "a\n", ""])
def test_a_name_stays_in_its_folder(name):
    table = {"name": name, "task": TASK, "training": {"steps": 1}}
    with pytest.raises(ConfigError, match="name: should be made of letters, digits"):
        parse_config(table | {"optimizers": {"a": {"method": "adam"}}})


def test_labels_stay_in_the_folder_of_a_run(tmp_path):
    labels = ["../../up", "/etc/gradxform", "..", ""]
    table = ", ".join(f"{json.dumps(k)}={{method='sgd', learning_rate=0.1}}" for k in labels)
    options = ["training.steps=2", f"optimizers={{{table}}}"]
    args = ["run", "valley", "--tensorboard", "--out", str(tmp_path / "a" / "run")]
    before = sorted(Path("/etc").glob("gradxform*"))
    done = CliRunner().invoke(app, args + [x for o in options for x in ("--set", o)])
    assert done.exit_code == 0, done.output
    assert sorted(Path("/etc").glob("gradxform*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
    assert len(list((tmp_path / "a" / "run" / "tensorboard").iterdir())) == len(labels)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x00", "\r", "\x9b1m", "\b"])
def test_a_config_sends_a_terminal_no_orders(text):
    table = {"name": "x", "task": TASK, "training": {"steps": 1}, "title": text}
    with pytest.raises(ConfigError) as caught:
        parse_config(table | {"optimizers": {text: {"method": "adam"}}, f"{text}a": 1})
    wanted = "have no control characters, found"
    told = [f"title: should {wanted} {text!r}", f"optimizers: a label should {wanted} {text!r}"]
    assert set(told) < set(map(str, caught.value.problems))
    assert text not in str(caught.value)


# -- checkpoints


class Payload:
    """What pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def signed(folder):
    """Makes the manifest fit the files, as somebody can who has changed them."""
    digests = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file != folder / "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(digests))


def test_a_checkpoint_of_an_attacker_holds_arrays_or_nothing(tmp_path):
    """Every file in turn is made something else, and the manifest made to fit."""
    ran = tmp_path / "ran"
    pickled = pickle.dumps(Payload(ran))
    pickle.Unpickler(io.BytesIO(pickled)).load().close()  # it would
    ran.unlink()
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    save(tmp_path / "c", Snapshot(1, {"rows": []}, {"w": jnp.arange(6.0)}), keep=1, about=None)
    folder = tmp_path / "c" / "00000001"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    tampered = [pickled, code.encode(), json.dumps({"py/object": code}).encode(), b"null", b""]
    tampered += [b"[]", b'{"number": 1}', b"[" * 10**5, b'{"number": 1, "told": 3, "about": 3}']
    outcomes = []
    for file in files:
        original = file.read_bytes()
        swapped = original.replace(b"ArrayRestoreArgs", b"os.system").replace(b"jax.Array", b"eval")
        for content in [*tampered, swapped]:
            file.write_bytes(content)
            signed(folder)
            told = []
            found = newest(tmp_path / "c", told.append)
            outcomes.append(found is None)
            assert (found is None) == bool(told)
            if found is not None:
                assert all(isinstance(x, np.ndarray | np.generic) for x in leaves(found[0].arrays))
        file.write_bytes(original)
    for manifest in (b"[" * 10**5, b"3", b"\xff", pickled):
        (folder / "manifest.json").write_bytes(manifest)
        assert newest(tmp_path / "c", lambda message: None) is None
    assert not ran.exists()
    assert len(files) >= 4
    assert any(outcomes)


def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path):
    save(tmp_path / "c", Snapshot(1, {}, {"w": jnp.arange(6.0)}), keep=1)
    folder = tmp_path / "c" / "00000001"
    told = []
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["../../secret"] = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert newest(tmp_path / "c", told.append) is None
    assert "../../secret is missing" in told[0]
    assert checkpoints.numbered(tmp_path / "c")
