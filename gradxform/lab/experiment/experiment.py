"""A config with what is made from it: its TOML text and its optimisers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from gradxform.lab.experiment import methods
from gradxform.lab.experiment.load import to_toml
from gradxform.lab.experiment.schema import Config

if TYPE_CHECKING:
    import optax


class Experiment(NamedTuple):
    """A config, read once, written once, and its optimisers, built once."""

    config: Config
    toml: str  #: the config as text, with all defaults
    transformations: "Mapping[str, optax.GradientTransformationExtraArgs]"  #: by label


def prepared(config: Config | Experiment) -> Experiment:
    """The experiment of a config; an experiment is returned as it is.

    Raises:
      ConfigError: optimisers cannot be built. The error lists all of them.
    """
    if isinstance(config, Experiment):
        return config
    return Experiment(config, to_toml(config), methods.build_all(config.optimizers))
