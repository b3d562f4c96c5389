"""The list of public names of the lab. ``__init__.py`` reads it too."""

from gradxform.lab.api import Movie as Movie
from gradxform.lab.api import load_config as load_config
from gradxform.lab.api import load_run as load_run
from gradxform.lab.api import movie as movie
from gradxform.lab.api import plot as plot
from gradxform.lab.api import race as race
from gradxform.lab.api import sweep as sweep
from gradxform.lab.experiment.problems import ConfigError as ConfigError
from gradxform.lab.experiment.registry import curve as curve
from gradxform.lab.experiment.registry import dataset as dataset
from gradxform.lab.experiment.registry import logger as logger
from gradxform.lab.experiment.registry import method as method
from gradxform.lab.experiment.registry import model as model
from gradxform.lab.experiment.registry import surface as surface
from gradxform.lab.experiment.registry import task as task
from gradxform.lab.tasks.task import Batch as Batch
from gradxform.lab.tasks.task import Task as Task
from gradxform.lab.training.outcomes import RaceResult as RaceResult
from gradxform.lab.training.outcomes import SweepResult as SweepResult

__all__: list[str]
