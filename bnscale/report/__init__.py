"""Claims held against measurements, figures drawn as the papers draw them, one HTML file."""

from bnscale.report.claims import Claim, Judged, Standing, Verdict, judge, queries
from bnscale.report.figures import Figure
from bnscale.report.page import provenance, terminal, write

__all__ = ["Claim", "Figure", "Judged", "Standing", "Verdict", "judge", "provenance", "queries", "terminal", "write"]
