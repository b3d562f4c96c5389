"""The tables of a config, with their keys, bounds and defaults."""

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gradxform.lab.experiment import grid, registry
from gradxform.lab.experiment.problems import CONTROL

Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MAX_EPOCHS, MAX_STEPS, MAX_BATCH, MAX_WIDTH = 10**5, 10**6, 10**6, 10**5
MAX_POINTS = 1000  # per side of a grid of starts
Epochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Order = Literal["reshuffle", "shuffle_once", "sequential", "online"]


def _batch_size(value: Any) -> int | Literal["full"]:
    if value == "full" or (type(value) is int and 1 <= value <= MAX_BATCH):
        return value
    raise PydanticCustomError(
        "batch_size", 'a whole number from 1 to {largest}, or "full"', {"largest": MAX_BATCH}
    )


def _point(value: Any) -> tuple[float, float]:
    match value:
        case [x, y] if all(type(z) in (int, float) and abs(z) <= 1e30 for z in (x, y)):
            return float(x), float(y)
    raise PydanticCustomError("point", "a pair of numbers, like [-1.5, 2.0]")


def _starts(value: Any) -> dict[str, int] | tuple[tuple[float, float], ...]:
    match value:
        case {"points": int() as points} if len(value) == 1 and 2 <= points <= MAX_POINTS:
            return {"points": points}
        case list() if value:
            return tuple(map(_point, value))
    raise PydanticCustomError(
        "starts",
        "{points = 21}, with 2 to {most} a side, or a list of pairs like [[-1.5, 2.0]]",
        {"most": MAX_POINTS},
    )


def _rungs(value: Any) -> tuple[int, ...]:
    epochs = value if isinstance(value, list) else [0]
    if all(type(epoch) is int and epoch >= 1 for epoch in epochs) and epochs == sorted(set(epochs)):
        return tuple(epochs)
    raise PydanticCustomError("rungs", "a list of epochs, each after the one before, like [2, 6]")


def _widths(value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, list) and value else [0]
    if all(type(width) is int and 1 <= width <= MAX_WIDTH for width in given):
        return tuple(given)
    raise PydanticCustomError(
        "widths", "a list of whole numbers from 1 to {largest}", {"largest": MAX_WIDTH}
    )


class Names(NamedTuple):
    """The names that a key accepts: ours, and those that users registered."""

    kind: str  #: kind of the users' names, see :mod:`gradxform.lab.experiment.registry`
    ours: tuple[str, ...]

    def known(self) -> tuple[str, ...]:
        return registry.choices(self.kind, self.ours)

    def __call__(self, value: Any) -> str:
        names = self.known()
        if isinstance(value, str) and value in names:
            return value
        *most, last = map(repr, names) if names else ["a name that a --with file registers"]
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise PydanticCustomError("name", "{wanted}", {"wanted": wanted, "names": names})


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def is_own(dataset: object) -> bool:
    """Whether a user has registered a data set of this name."""
    return registry.find("dataset", dataset) is not None


class _DataTask(Table):
    model_options: dict[str, Any] = {}  #: arguments of the model, like ``hidden = 32``
    validation_split: Fraction = 0.0  #: fraction of the training examples held out, the last ones
    examples: Annotated[int | None, Field(ge=1)] = None  #: use only the first so many
    l1: Coefficient = 0.0  #: weight of the sum of absolute values of the kernels
    l2: Coefficient = 0.0  #: weight of the sum of squares of the kernels


_IMAGES = "digits", "mnist", "fashion_mnist", "cifar10"


class _LabelledTask(_DataTask):
    file: str | None = None
    """a CSV, NPZ or Parquet file in ``--data-dir``, or without it in the working directory"""
    target: Annotated[str | None, Field(min_length=1)] = None  #: the column of ``file`` to predict
    inputs: Annotated[list[str] | None, Field(min_length=1)] = None
    """the columns of ``file`` to predict from; all others if not given"""
    dataset_options: dict[str, Any] | None = None  #: arguments of a registered data set
    standardise: bool | None = None
    """whether inputs, and the target of a regression, get the mean 0 and the standard deviation 1
    in the training part; for data of your own"""
    test_split: Fraction | None = None
    """the fraction of the examples that tests; for data of your own, 0.2 if not given"""
    split_seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    """the seed of the random order in which the examples are split; 0 if not given"""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, table: Any) -> Any:
        """The table with the defaults of the keys that only own data have."""
        if not isinstance(table, dict) or not ("file" in table or is_own(table.get("dataset"))):
            return table
        return {"standardise": False, "test_split": 0.2, "split_seed": 0, **table}


class Classification(_LabelledTask):
    """``[task]`` with ``kind = "classification"``: cross-entropy of labelled examples."""

    kind: Literal["classification"]  #: the kind of task
    dataset: Annotated[str | None, PlainValidator(Names("dataset", _IMAGES))] = None
    """the examples; or give ``file``"""
    model: Annotated[
        str, PlainValidator(Names("model", ("keras_mlp", "logistic", "mlp", "cnn")))
    ]  #: the net


class Regression(_LabelledTask):
    """``[task]`` with ``kind = "regression"``: a squared or Huber loss of predicted numbers."""

    kind: Literal["regression"]  #: the kind of task
    dataset: Annotated[str | None, PlainValidator(Names("dataset", ()))] = None
    """the examples; or give ``file``"""
    model: Annotated[
        str, PlainValidator(Names("model", ("linear", "keras_mlp", "mlp")))
    ]  #: the net
    loss: Literal["squared", "huber"] = "squared"
    """loss of an error: its square; or ``huber``, which grows linearly from ``delta`` on"""
    delta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """where Huber's loss turns linear, in units of the target, or of its standard deviation if it
    is standardised"""


class Autoencoder(_DataTask):
    """``[task]`` with ``kind = "autoencoder"``: images reconstructed from a short code."""

    kind: Literal["autoencoder"]
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"]  #: the images
    model: Literal["autoencoder"] = "autoencoder"
    loss: Literal["squared", "cross_entropy"] = "squared"  #: loss of a pixel, summed over the image


class Language(_DataTask):
    """``[task]`` with ``kind = "language"``: cross-entropy of the next character of a text."""

    kind: Literal["language"]  #: the kind of task
    dataset: Literal["synthetic_text"] = "synthetic_text"  #: the text
    model: Literal["transformer"] = "transformer"  #: the net


class Physics(Table):
    """``[task]`` with ``kind = "physics"``: a net that solves a differential equation."""

    kind: Literal["physics"]
    equation: Literal["burgers"] = "burgers"  #: the equation
    viscosity: Annotated[float, Field(ge=1e-3, le=1)] = 0.003183098861837907
    """viscosity of the fluid; the less, the steeper is the solution"""
    points: Annotated[int, Field(ge=1, le=2**15)] = 2048
    """points at which the equation should hold; they are the training examples"""
    hidden: Annotated[tuple[int, ...], PlainValidator(_widths)] = (10, 10, 10, 10)
    """units of each tanh layer of the net"""

    @property
    def dataset(self) -> str:
        """The name of the points in :func:`gradxform.lab.data.sets.load`."""
        return self.equation


class SurfaceTask(Table):
    """``[task]`` with ``kind = "surface"``: a function of two variables."""

    kind: Literal["surface"]  #: the kind of task
    surface: Annotated[str, PlainValidator(Names("surface", registry.OURS["surface"]))]
    """the function"""
    start: Annotated[tuple[float, float] | None, PlainValidator(_point)] = (
        None  #: the surface's own start if not given
    )


class OwnTask(BaseModel):
    """``[task]`` with the name of a registered task as its kind, and the task's options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    kind: Annotated[str, PlainValidator(Names("task", ()))]  #: the kind of task


class TrainingOverride(Table):
    """``[training.overrides.LABEL]``: different settings for one optimiser."""

    epochs: Epochs | None = None  #: replaces the key of ``[training]``
    batch_size: Annotated[int | Literal["full"] | None, PlainValidator(_batch_size)] = None
    """replaces the key of ``[training]``; this optimiser then sees other batches"""
    order: Order | None = None  #: replaces the key of ``[training]``
    max_seconds: Seconds | None = None  #: replaces the key of ``[training]``


class Training(Table):
    """``[training]`` for a task on data."""

    epochs: Epochs  #: passes over the training examples
    batch_size: Annotated[int | Literal["full"], PlainValidator(_batch_size)] = 128
    """training examples in a batch; ``"full"`` takes all of them"""
    order: Order = "reshuffle"
    """how examples are drawn: in a new random order for each epoch, in one random order for all
    epochs, in the order of storage, or independently without passes"""
    max_seconds: Seconds | None = None
    """stop an optimiser after the first epoch at which it has trained for longer, not counting
    compilation and evaluation; repeated runs may stop at different epochs"""
    overrides: dict[str, TrainingOverride] = {}  #: by label of the optimiser


class SurfaceTraining(Table):
    """``[training]`` for a surface."""

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]  #: number of updates


class _AnySweep(Table):
    axes: dict[str, Any] = {}
    """axes for all optimisers that have the hyperparameter, see
    :func:`gradxform.lab.experiment.grid.read_axes`"""
    overrides: dict[str, dict[str, Any]] = {}  #: by label, axes for one optimiser
    samples: Annotated[int | None, Field(ge=1, le=grid.MAX_MEMBERS)] = None
    """number of random points of each optimiser, instead of a grid"""


class Sweep(_AnySweep):
    """``[sweep]`` for a task on data, see :func:`gradxform.lab.training.sweep.sweep_on_task`."""

    seeds: Annotated[int, Field(ge=1, le=grid.MAX_MEMBERS)] = 1  #: runs of each point
    vary: Literal["initialisation", "order", "both"] = "initialisation"  #: what a seed changes
    block_size: Annotated[int | None, Field(ge=1, le=grid.MAX_MEMBERS)] = None
    """members that train together; if not given, chosen by memory and speed"""
    rungs: Annotated[tuple[int, ...], PlainValidator(_rungs)] = ()
    """epochs after which only the better points of an optimiser continue"""
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5  #: fraction that continues


class SurfaceSweep(_AnySweep):
    """``[sweep]`` for a surface, see :func:`gradxform.lab.training.surfaces.sweep_on_surface`."""

    starts: Annotated[
        dict[str, int] | tuple[tuple[float, float], ...] | None, PlainValidator(_starts)
    ] = None
    """a grid over the drawn part of the surface with so many points per side, or a list of starts;
    if not given, only the start of the task"""
    tol: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """a method has converged when no gradient entry exceeds this"""


class Checkpoint(Table):
    """``[checkpoint]`` for a task on data: how often to save the state of a run."""

    every: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 0
    """epochs between two checkpoints, counted over all optimisers; 0 for none"""
    keep: Annotated[int, Field(ge=1, le=MAX_EPOCHS)] = 2  #: how many of the latest to keep


class Output(Table):
    """``[output]``: where to write results."""

    folder: Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")] = "runs"
    """each run makes a new folder inside"""


class _Experiment(Table):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """the name of the experiment, also of the folder that a run makes"""
    title: Annotated[str, StringConstraints(pattern=f"^[^{CONTROL}]*$")] = ""
    """title of the plots; the name if empty"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """the seed of the initial parameters, the batches and dropout"""
    optimizers: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """one table for each optimiser, under a label of your choice"""
    output: Output = Output()
    with_files: dict[str, str] | None = None
    """the files of ``--with``, with their SHA-256; written by a run"""


class _OnData(_Experiment):
    training: Training
    sweep: Sweep | None = None
    checkpoint: Checkpoint = Checkpoint()


# One class per kind of task, so that every problem has one path and one list of valid keys.
class ClassificationConfig(_OnData):
    """An experiment with ``task.kind = "classification"``."""

    task: Classification


class RegressionConfig(_OnData):
    """An experiment with ``task.kind = "regression"``."""

    task: Regression


class AutoencoderConfig(_OnData):
    """An experiment with ``task.kind = "autoencoder"``."""

    task: Autoencoder


class LanguageConfig(_OnData):
    """An experiment with ``task.kind = "language"``."""

    task: Language


class PhysicsConfig(_OnData):
    """An experiment with ``task.kind = "physics"``. It runs in float64."""

    task: Physics


class OwnConfig(_OnData):
    """An experiment whose ``task.kind`` is a registered task."""

    task: OwnTask


class SurfaceConfig(_Experiment):
    """An experiment with ``task.kind = "surface"``."""

    task: SurfaceTask
    training: SurfaceTraining
    sweep: SurfaceSweep | None = None


TaskConfig: TypeAlias = (
    ClassificationConfig
    | RegressionConfig
    | AutoencoderConfig
    | LanguageConfig
    | PhysicsConfig
    | OwnConfig
)
Config: TypeAlias = TaskConfig | SurfaceConfig

SECTIONS = (
    *("name", "title", "seed", "task", "training"),
    *("optimizers", "sweep", "checkpoint", "output", "with_files"),
)
