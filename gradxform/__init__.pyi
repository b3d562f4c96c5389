"""The list of public names. ``__init__.py`` reads it too."""

from gradxform.averaging import polyak_average as polyak_average
from gradxform.covariances import covariance as covariance
from gradxform.curvature import gauss_newton as gauss_newton
from gradxform.curvature import hessian as hessian
from gradxform.evaluation import eval_params as eval_params
from gradxform.first_order.adadelta import adadelta as adadelta
from gradxform.first_order.adadelta import scale_by_adadelta as scale_by_adadelta
from gradxform.first_order.adagrad import adagrad as adagrad
from gradxform.first_order.adagrad import scale_by_adagrad as scale_by_adagrad
from gradxform.first_order.adam import adam as adam
from gradxform.first_order.adam import scale_by_adam as scale_by_adam
from gradxform.first_order.coordinate_descent import coordinate_descent as coordinate_descent
from gradxform.first_order.delta_bar_delta import delta_bar_delta as delta_bar_delta
from gradxform.first_order.momentum import momentum as momentum
from gradxform.first_order.nesterov import nesterov as nesterov
from gradxform.first_order.rmsprop import rmsprop as rmsprop
from gradxform.first_order.rmsprop import scale_by_rmsprop as scale_by_rmsprop
from gradxform.first_order.rprop import rprop as rprop
from gradxform.first_order.sgd import sgd as sgd
from gradxform.fitting import least_squares as least_squares
from gradxform.forward import forward_mode as forward_mode
from gradxform.line_search import with_line_search as with_line_search
from gradxform.minimization import minimize as minimize
from gradxform.minimization import progress_bar as progress_bar
from gradxform.objective import compose as compose
from gradxform.per_example import by_rows as by_rows
from gradxform.preconditioners import hutchinson_diagonal as hutchinson_diagonal
from gradxform.preconditioners import nystrom as nystrom
from gradxform.schedules import inverse_time_decay as inverse_time_decay
from gradxform.schedules import linear_decay as linear_decay
from gradxform.second_order.bfgs import bfgs as bfgs
from gradxform.second_order.bfgs import scale_by_bfgs as scale_by_bfgs
from gradxform.second_order.hessian_free import hessian_free as hessian_free
from gradxform.second_order.kronecker import kronecker as kronecker
from gradxform.second_order.kronecker_direction import scale_by_kronecker as scale_by_kronecker
from gradxform.second_order.kronecker_inverse import kronecker_inverse as kronecker_inverse
from gradxform.second_order.lbfgs import lbfgs as lbfgs
from gradxform.second_order.lbfgs import scale_by_lbfgs as scale_by_lbfgs
from gradxform.second_order.levenberg_marquardt import (
    levenberg_marquardt as levenberg_marquardt,
)
from gradxform.second_order.newton import newton as newton
from gradxform.second_order.newton import scale_by_newton as scale_by_newton
from gradxform.second_order.newton_cg import newton_cg as newton_cg
from gradxform.second_order.newton_cg import scale_by_newton_cg as scale_by_newton_cg
from gradxform.second_order.nonlinear_cg import nonlinear_cg as nonlinear_cg
from gradxform.second_order.nonlinear_cg import scale_by_nonlinear_cg as scale_by_nonlinear_cg
from gradxform.second_order.trust_region import trust_region as trust_region
from gradxform.solution import History as History
from gradxform.solution import Solution as Solution
from gradxform.solution import Status as Status
from gradxform.squares import sum_of_squares as sum_of_squares
from gradxform.stopping import Progress as Progress
from gradxform.stopping import max_evaluations as max_evaluations
from gradxform.stopping import reached as reached
from gradxform.stopping import small_change as small_change
from gradxform.stopping import small_gradient as small_gradient
from gradxform.stopping import small_step as small_step
from gradxform.wrappers.accumulation import accumulate as accumulate
from gradxform.wrappers.flax import nnx_value_fn as nnx_value_fn
from gradxform.wrappers.hyperparameters import inject_hyperparams as inject_hyperparams
from gradxform.wrappers.masking import masked as masked
from gradxform.wrappers.masking import partition as partition
from gradxform.wrappers.projection import projected as projected
from gradxform.wrappers.projection import proximal as proximal
from gradxform.wrappers.projection import soft_threshold as soft_threshold
from gradxform.wrappers.rounding import rounded_stochastically as rounded_stochastically

__version__: str
