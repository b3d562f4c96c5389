"""The lab around the methods: configs, data, models, races, plots and the command line."""

from gradxform.lab.experiment.registry import dataset as dataset
from gradxform.lab.experiment.registry import logger as logger
from gradxform.lab.experiment.registry import method as method
from gradxform.lab.experiment.registry import model as model
from gradxform.lab.experiment.registry import surface as surface
from gradxform.lab.experiment.registry import task as task


def __getattr__(name: str):
    if name == "Task":
        from gradxform.lab.tasks.task import Task

        return Task
    raise AttributeError(name)
