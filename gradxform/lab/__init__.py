"""The lab around the methods: races, sweeps and movies of optimisers, from Python.

The functions do what the commands of ``gradxform`` do, and return the results. The decorators
register your own data sets, models, tasks, surfaces, curves, methods and loggers. Names are
imported at their first use, so importing the lab is quick and does not import JAX.

>>> import gradxform.lab as lab
>>> result = lab.race({
...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1.0, 0.5]},
...     "training": {"steps": 2}, "optimizers": {"SGD": {"method": "sgd", "learning_rate": 0.25}},
... })
>>> round(result.rows[-1]["value"], 2)
-0.67
"""

from gradxform.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, globals())
