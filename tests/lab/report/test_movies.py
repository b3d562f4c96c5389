"""Movies: their frames, what these show, the files made of them, and how they fail."""

import io
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gradxform.lab.cli import app
from gradxform.lab.experiment.load import load_config, parse_config
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.report import frames as drawing
from gradxform.lab.report import movies
from gradxform.lab.report.frames import MOST_FRAMES, draw_walks
from gradxform.lab.report.movies import gif, movie, mp4, usual_fps
from gradxform.lab.report.style import METHODS
from gradxform.lab.report.zoom import CLOSEST, last_move, shown_steps, windows
from gradxform.lab.tasks.surfaces import SURFACES

SURFACE = SURFACES["quadratic"]
START = np.asarray(SURFACE.start)
WALK = START + np.outer(np.arange(6), [1.0, 0.5])  # six points inside the picture
SHORT = ["--set", "training.steps=3", "--set", "optimizers={a={method='adam'}}"]


def invoke(*args, **environment):
    return CliRunner().invoke(app, [str(a) for a in args], env=environment or None)


@pytest.fixture(scope="module")
def frames():
    return draw_walks(SURFACE, {"walk": WALK, "still": WALK[:1]}, title="A walk")


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max(axis=-1)


def opened(data):
    """The frames of a GIF, and for how many milliseconds each stays."""
    with Image.open(io.BytesIO(data)) as image:
        shown, stays = [], []
        for i in range(image.n_frames):
            image.seek(i)
            shown.append(image.convert("RGB"))
            stays.append(image.info["duration"])
        assert image.format == "GIF"
        assert image.info["loop"] == 0
    return shown, stays


def test_every_step_has_a_frame_800_pixels_wide(frames):
    assert len(frames) == 6
    assert {(frame.size, frame.mode) for frame in frames} == {((800, 480), "RGB")}
    for one, other in itertools.pairwise(frames):
        assert (difference(one, other) > 100).any()


def test_more_optimizers_make_a_taller_picture_of_even_height():
    many = {f"method {i}": WALK[:1] for i in range(15)}
    (frame,) = draw_walks(SURFACE, many)
    assert frame.size == (800, 600)


def test_the_steps_shown_are_few_and_go_from_the_first_to_the_last():
    assert shown_steps(0) == [0]
    assert shown_steps(119) == list(range(120))
    for steps in (120, 121, 10**6):
        shown = shown_steps(steps)
        assert (shown[0], shown[-1]) == (0, steps)
        assert len(shown) <= MOST_FRAMES
        skips = np.diff(shown)
        assert (skips > 0).all()
        assert skips[0] == skips.min()
        assert skips[-1] == skips.max()
    assert len(draw_walks(SURFACE, {"walk": WALK}, most=3)) == 3


@pytest.fixture
def drawn(monkeypatch):
    """The walks that are drawn and the text of the step, as they are after the last frame."""
    kept, stage = SimpleNamespace(), drawing._stage

    def spy(*args):
        kept.walks, kept.counter, kept.zoom = stage(*args)
        return kept.walks, kept.counter, kept.zoom

    monkeypatch.setattr(drawing, "_stage", spy)
    return kept


def test_the_last_frame_shows_the_whole_paths(drawn):
    draw_walks(SURFACE, {"walk": WALK, "short": WALK[:3]})
    for walk, path in zip(drawn.walks, (WALK, WALK[:3]), strict=True):
        np.testing.assert_allclose(walk.trail.get_xydata(), path)
        np.testing.assert_allclose(walk.heads[0].get_xydata(), path[-1:])
        value = float(SURFACE.fn(path[-1]))
        np.testing.assert_allclose(walk.heads[1].get_xydata(), [[len(path) - 1, value]], rtol=1e-5)
        assert float(walk.value.get_text()) == pytest.approx(value, rel=0.05)
        assert not len(walk.mark.get_xdata())
    assert drawn.counter.get_text() == "update 5"


def test_a_frame_shows_no_more_than_its_step(drawn):
    draw_walks(SURFACE, {"walk": WALK})
    (walk,) = drawn.walks
    drawing._move(walk, 2)
    np.testing.assert_allclose(walk.trail.get_xydata(), WALK[:3])
    np.testing.assert_array_equal(walk.curve.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(walk.heads[0].get_xydata(), WALK[2:3])


def test_a_diverged_walk_ends_in_a_mark_and_says_so(drawn):
    far, nowhere = WALK[1] + (960.0, 100.0), np.full((2, 2), np.nan)
    lost = np.concatenate([WALK[:2], [far], nowhere])
    draw_walks(SURFACE, {"lost": lost, "walk": WALK})
    walk = drawn.walks[0]
    assert walk.value.get_text() == "diverged at 3"
    # where it crossed the right edge
    np.testing.assert_allclose(walk.mark.get_xydata(), [[6.0, WALK[1, 1] + 1.0]])
    assert not any(head.get_visible() for head in walk.heads)
    drawing._move(walk, 2)
    assert walk.value.get_text() != "diverged at 3"
    assert not len(walk.mark.get_xdata())


def test_a_walk_that_diverges_inside_the_picture_is_marked_at_its_last_point(drawn):
    draw_walks(SURFACE, {"lost": np.concatenate([WALK[:2], [[np.inf, 0.0]]])})
    np.testing.assert_allclose(drawn.walks[0].mark.get_xydata(), WALK[1:2])


def test_texts_are_shown_as_they_are(drawn):
    long = "a name much too long to stand beside a value"
    draw_walks(SURFACE, {"_$x_{": WALK[:1], long: WALK[:1]}, title="$x_$")
    shown = [text.get_text() for text in drawn.walks[0].value.axes.texts]
    assert "_$x_{" in shown
    (name,) = (text for text in shown if text.startswith("a name"))
    assert name == long[:25] + "…"


def test_a_walk_without_height_can_be_drawn():
    assert len(draw_walks(SURFACE, {"at the minimum": np.zeros((2, 2))})) == 1  # it never moves


def test_the_movie_ends_where_nothing_moves_any_more(drawn):
    waiting = np.concatenate([WALK, np.tile(WALK[-1], (40, 1))])
    assert len(draw_walks(SURFACE, {"walk": waiting, "short": WALK[:2]})) == 6
    assert drawn.counter.get_text() == "update 5, then still until 45"
    (curves,) = {walk.curve.axes for walk in drawn.walks}
    assert curves.get_xlim() == (0, pytest.approx(5.2))


@pytest.mark.parametrize(
    ("heights", "diverged", "end"),
    [
        ([4.0, 1.0, 1.0, 1.0], False, 1),
        ([4.0, 1.0, 0.5, 0.501], False, 2),  # less than anyone sees
        ([4.0, 1e-9, 1e-9, 1e-11], False, 3),  # the curve of the heights still falls
        ([4.0, 1.0, 1.0, 1.0], True, 4),  # the mark comes after the last point
        ([0.0, 0.0, 0.0, 0.0], False, 0),
    ],
)
def test_the_last_move_is_one_that_can_be_seen(heights, diverged, end):
    still = np.tile(START, (4, 1))
    assert last_move([(still, np.asarray(heights), diverged)], SURFACE) == end
    far = still.copy()
    far[:3] += 0.01
    assert last_move([(far, np.ones(4), False)], SURFACE) == 3


def spiral(turns=6, steps=200):
    """A walk that comes closer to (1, −1) by a constant factor at each step."""
    angle = np.linspace(0, 2 * np.pi * turns, steps)
    radius = 4 * np.exp(-angle / 4)
    return [1, -1] + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_the_zoom_is_smooth_and_keeps_every_walker_in_the_picture():
    walks = [spiral(), spiral()[:50]]
    steps = shown_steps(199)
    shown = np.asarray(windows(walks, SURFACE, steps))
    np.testing.assert_allclose(shown[0], SURFACE.bounds)
    sizes = np.diff(shown, axis=2)[..., 0] / np.diff(SURFACE.bounds)[:, 0]
    np.testing.assert_allclose(sizes[:, 0], sizes[:, 1])  # the shape of the whole picture
    assert (np.diff(sizes[:, 0]) <= 1e-9).all()
    assert (sizes[1:, 0] / sizes[:-1, 0] > 0.5).all()
    for walk in walks:
        for step, ((left, right), (bottom, top)) in zip(steps, shown, strict=True):
            x, y = walk[min(step, len(walk) - 1)]
            assert left <= x <= right
            assert bottom <= y <= top
    assert sizes[-1, 0] < 0.9 * sizes[0, 0]


def test_the_zoom_has_an_end():
    walk = START + np.outer(0.9 ** np.arange(300), [1.0, 1.0])
    last = windows([walk], SURFACE, shown_steps(299))[-1]
    assert CLOSEST <= (last[0, 1] - last[0, 0]) / 12 <= 2 * CLOSEST


def test_a_zoomed_frame_says_how_large_it_is(drawn):
    walk = START + np.outer(0.8 ** np.arange(60), [1.0, 0.5])
    draw_walks(SURFACE, {"walk": walk})
    assert drawn.zoom.get_text().endswith("times enlarged")
    draw_walks(SURFACE, {"walk": np.asarray([START, -START])})
    assert drawn.zoom.get_text() == ""


def test_the_drawing_tells_how_far_it_is():
    told = []
    draw_walks(SURFACE, {"walk": WALK}, on_frame=lambda *done: told.append(done))
    assert told == [(i, 6) for i in range(1, 7)]


def test_the_methods_of_a_movie_have_their_colours(drawn):
    tables = {"walk": {"method": "adam"}, "other": {"method": "sgd"}}
    draw_walks(SURFACE, {"walk": WALK, "other": WALK[:3]}, optimizers=tables)
    colours = [METHODS[name].style.color for name in ("adam", "sgd")]
    assert [walk.trail.get_color() for walk in drawn.walks] == colours
    assert [walk.curve.get_color() for walk in drawn.walks] == colours


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "paths is empty"),
        ({"a": np.zeros((3, 3))}, r"paths\['a'\] should be of shape \(steps \+ 1, 2\)"),
        ({"a": np.full((2, 2), np.nan)}, "quadratic is not finite at the start"),
    ],
    ids=["none", "shape", "start"],
)
def test_what_cannot_be_drawn_is_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        draw_walks(SURFACE, paths)


def test_a_gif_has_the_frames_in_their_colours():
    fan = {
        str(i): START + np.outer(np.arange(4.0), [np.cos(i), np.sin(i)])  # as many as colours
        for i in range(7)
    }
    frames = draw_walks(SURFACE, fan)
    shown, _ = opened(gif(frames))
    assert [frame.size for frame in shown] == [(800, 480)] * 4
    for frame, given in zip(shown, frames, strict=True):
        assert difference(frame, given).mean() < 1
        assert (difference(frame, given) > 24).mean() < 0.001
        assert frame.getpixel((2, 2)) == (255, 255, 255)
        grey = np.ptp(np.asarray(given, int), axis=-1) <= 1
        assert np.ptp(np.asarray(frame, int), axis=-1)[grey].max() < 10  # the contours


def test_a_gif_lasts_as_long_as_asked(frames):
    _, stays = opened(gif(frames, fps=30))
    assert stays[-1] == pytest.approx(2000, abs=10)
    # in hundredths: 33.3 ms are now 30, now 40, and do not add up to an error
    assert set(stays[:-1]) == {30, 40}
    assert sum(stays[:-1]) == 170
    _, stays = opened(gif(frames))
    np.testing.assert_allclose(stays[:-1], 1000 / usual_fps(6), atol=10)


def test_one_frame_is_a_gif(frames):
    shown, _ = opened(gif(frames[:1]))
    assert len(shown) == 1


def box_names(data):
    """The names of an MP4's outermost boxes."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        found.append(data[at + 4 : at + 8])
        at += size
    return found


def lasts(data):
    """How many seconds an MP4 lasts, by its header."""
    at = data.index(b"mvhd") + 4
    unit, length = (int.from_bytes(data[i : i + 4]) for i in (at + 12, at + 16))
    return length / unit


def test_an_mp4_is_made_of_all_frames_without_an_ffmpeg_of_the_system(frames, monkeypatch):
    monkeypatch.setenv("PATH", "")
    data = mp4(frames, fps=10)
    names = box_names(data)
    assert names.index(b"moov") < names.index(b"mdat")  # it can be shown while it is loaded
    assert lasts(data) == pytest.approx(0.5 + 2.0)  # the last frame stays for two seconds
    assert b"libx264" in data or b"avc1" in data
    at = data.index(b"tkhd")
    assert (800 << 16).to_bytes(4) in data[at : at + 100]


def test_what_ffmpeg_says_is_told(frames, tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    told = "import sys; sys.stdin.buffer.read(); sys.exit('first line\\nno such codec')"
    program.write_text(f"#!{sys.executable}\n{told}\n")
    program.chmod(0o755)
    monkeypatch.setattr(movies, "ffmpeg", lambda: str(program))
    with pytest.raises(OSError, match=r"^ffmpeg failed: no such codec$"):
        mp4(frames)


def test_an_mp4_without_ffmpeg_is_refused_with_the_mend(frames, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(FileNotFoundError, match=r"mp4 needs ffmpeg.*choose the format gif"):
        mp4(frames)


def test_a_config_walks_to_where_its_race_ends(drawn):
    config = load_config("valley", ["training.steps=3", *SHORT[3:]])
    assert len(movie(config)) == 4
    from gradxform.lab.training.race import race

    last = race(config).histories[0].rows[-1]
    np.testing.assert_allclose(drawn.walks[0].trail.get_xydata()[-1], [last["x0"], last["x1"]])
    assert drawn.walks[0].value.get_text() == f"{last['value']:.2g}"


def test_a_config_of_no_surface_is_refused_with_the_mend():
    with pytest.raises(ConfigError, match=r"needs 'surface', found 'classification'.*like valley"):
        movie(load_config("digits_race"))


def test_a_start_out_of_range_is_refused():
    config = parse_config(
        {
            "name": "far",
            "task": {"kind": "surface", "surface": "rosenbrock", "start": [1e29, 1.0]},
            "training": {"steps": 1},
            "optimizers": {"a": {"method": "sgd", "learning_rate": 0.1}},
        }
    )
    with pytest.raises(ConfigError, match=r"task\.start: rosenbrock is not finite at the start"):
        movie(config)


def test_the_command_makes_a_folder_with_the_movie(tmp_path):
    out = tmp_path / "first"
    done = invoke("movie", "valley", *SHORT, "--fps", "25", "--out", out)
    assert done.exit_code == 0, done.output
    assert str(out / "movie.gif") in done.stderr
    assert sorted(file.name for file in out.iterdir()) == ["config.toml", "movie.gif"]
    shown, stays = opened((out / "movie.gif").read_bytes())
    assert len(shown) == 4
    assert stays == [40, 40, 40, 2000]
    assert load_config(out / "config.toml").training.steps == 3

    before = (out / "movie.gif").read_bytes()
    again = invoke("movie", "valley", *SHORT, "--out", out)
    assert again.exit_code == 2
    assert "no run is overwritten" in again.stderr
    assert (out / "movie.gif").read_bytes() == before


def test_the_command_makes_an_mp4(tmp_path):
    out = tmp_path / "first"
    done = invoke("movie", "valley", *SHORT, "--format", "mp4", "--out", out)
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in out.iterdir()) == ["config.toml", "movie.mp4"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["movie", "digits_race"], "digits_race"),
        (["movie", "valley", "--set", "optimizers.SGD.chain=[]"], "optimizers.SGD.chain"),
        (["movie", "valley", *SHORT, "--set", "task.start=[1e29, 1.0]"], "not finite at the start"),
        (["movie", "valley", "--fps", "0"], "--fps"),
        (["movie", "valley", "--fps", "nan"], "--fps"),
    ],
    ids=["no surface", "optimiser", "start", "fps", "no number"],
)
def test_a_failed_command_leaves_nothing(args, told, tmp_path):
    out = tmp_path / "runs" / "x"
    done = invoke(*args, "--out", out, PATH="")
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_what_ffmpeg_cannot_make_leaves_nothing(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("ffmpeg failed: no such codec")

    monkeypatch.setattr(movies, "mp4", fails)
    out = tmp_path / "runs" / "x"
    done = invoke("movie", "valley", *SHORT, "--format", "mp4", "--out", out)
    assert done.exit_code == 2
    assert "ffmpeg failed: no such codec" in done.stderr
    assert not out.parent.exists()


def test_a_missing_ffmpeg_is_told_before_the_race(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(movies, "movie", None)
    done = invoke("movie", "valley", "--format", "mp4", "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "mp4 needs ffmpeg" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_movie_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(movies, "movie", interrupted)
    done = invoke("movie", "valley", "--out", tmp_path / "x")
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["valley", "valley_second_order"])
def test_the_shipped_walks_arrive(name):
    from gradxform.lab.training.race import race

    histories = {history.label: history for history in race(load_config(name)).histories}
    assert not any(history.diverged for history in histories.values())
    values = {label: history.rows[-1]["value"] for label, history in histories.items()}
    best = {"valley": ("momentum", "Nesterov"), "valley_second_order": ("Newton", "trust region")}
    for label in best[name]:
        assert values[label] < 1e-5
        assert values[label] < 1e-3 * values["gradient descent"]
