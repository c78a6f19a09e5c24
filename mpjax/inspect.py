"""Reports on what precision does to a function or a model.

Every report prints as a text table, shows as HTML in a notebook, and exports with ``to_rows``
(for ``pandas.DataFrame``), ``to_dict`` and ``to_json``.
"""

from mpjax._check import check
from mpjax._check_report import CheckReport
from mpjax._explain import explain
from mpjax._flow_report import FlowReport
from mpjax._locate import NonFiniteReport, locate_nonfinite
from mpjax._report import Report

__all__ = [
  "CheckReport",
  "FlowReport",
  "NonFiniteReport",
  "Report",
  "check",
  "explain",
  "locate_nonfinite",
]
