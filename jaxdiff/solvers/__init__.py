"""Solvers: builders from a grid to a tableau, and the catalogue of all of them."""

from jaxdiff.solvers.catalogue import CATALOGUE as CATALOGUE
from jaxdiff.solvers.catalogue import build as build
from jaxdiff.solvers.catalogue import citation as citation
from jaxdiff.solvers.catalogue import find as find
from jaxdiff.solvers.catalogue import markdown_table as markdown_table
from jaxdiff.solvers.catalogue import names as names
from jaxdiff.solvers.catalogue.entry import Entry as Entry
from jaxdiff.solvers.catalogue.entry import Exactness as Exactness
from jaxdiff.solvers.catalogue.entry import Setting as Setting
from jaxdiff.solvers.combine import concatenate as concatenate
from jaxdiff.solvers.combine import stack as stack
from jaxdiff.solvers.dpm_solver_pp import dpm_solver_pp_multistep as dpm_solver_pp_multistep
from jaxdiff.solvers.first_order import ddim as ddim
from jaxdiff.solvers.first_order import ddpm as ddpm
from jaxdiff.solvers.phi import phi as phi
from jaxdiff.solvers.sigma import euler as euler
from jaxdiff.solvers.sigma import heun as heun
from jaxdiff.solvers.tableau import Row as Row
from jaxdiff.solvers.tableau import Start as Start
from jaxdiff.solvers.tableau import Tableau as Tableau
from jaxdiff.solvers.tableau import Update as Update
from jaxdiff.solvers.tableau import assemble as assemble
from jaxdiff.solvers.unipc import unipc as unipc
