"""The simulated runs of the tests of reports, and the data of the tests of metrics."""

from evaluate.conftest import *  # noqa: F403
from report.conftest import *  # noqa: F403
