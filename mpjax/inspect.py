"""Reports on what precision does to a function or a model.

Every report prints as a text table, shows as HTML in a notebook, and exports with ``to_rows``
(for ``pandas.DataFrame``), ``to_dict`` and ``to_json``.
"""

from mpjax._check import check
from mpjax._check_report import CheckReport
from mpjax._cost import CostReport, cost
from mpjax._explain import explain
from mpjax._flow_report import FlowReport
from mpjax._histogram import Histogram, histogram
from mpjax._locate import NonFiniteReport, locate_nonfinite
from mpjax._ranges import RangeReport, UpdateReport, range_report, update_report
from mpjax._record import Values, record
from mpjax._report import Report
from mpjax._statistics import Statistics, StatisticsState, collect_statistics, statistics
from mpjax._tune import tune
from mpjax._tune_report import TuneReport

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
