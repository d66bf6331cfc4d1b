"""Audit of a data set: checks of files, annotations and duplicates; validity of its labels."""

from imrcnn_d2.data.audit.checks import Audit, audit, groups
from imrcnn_d2.data.audit.findings import AREAS, KINDS, SEVERITIES, Finding, read_entries

__all__ = ["AREAS", "KINDS", "SEVERITIES", "Audit", "Finding", "audit", "groups", "read_entries"]
