"""Reports on what precision does to a function or a model.

Every report prints as a text table, shows as HTML in a notebook, and exports with ``to_rows``
(for ``pandas.DataFrame``), ``to_dict`` and ``to_json``.
"""

from mpjax.inspect._check import check
from mpjax.inspect._check_report import CheckReport
from mpjax.inspect._cost import cost
from mpjax.inspect._cost_report import CostReport
from mpjax.inspect._explain import explain
from mpjax.inspect._flow_report import FlowReport
from mpjax.inspect._histogram import Histogram, histogram
from mpjax.inspect._locate import NonFiniteReport, locate_nonfinite
from mpjax.inspect._ranges import RangeReport, UpdateReport, range_report, update_report
from mpjax.inspect._recording import Values, record
from mpjax.inspect._report import Report
from mpjax.inspect._statistics import Statistics, StatisticsState, collect_statistics, statistics
from mpjax.inspect._tune import tune
from mpjax.inspect._tune_report import TuneReport

__all__ = [
  "CheckReport",
  "CostReport",
  "FlowReport",
  "Histogram",
  "NonFiniteReport",
  "RangeReport",
  "Report",
  "Statistics",
  "StatisticsState",
  "TuneReport",
  "UpdateReport",
  "Values",
  "check",
  "collect_statistics",
  "cost",
  "explain",
  "histogram",
  "locate_nonfinite",
  "range_report",
  "record",
  "statistics",
  "tune",
  "update_report",
]
