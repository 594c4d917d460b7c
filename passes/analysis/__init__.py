"""What passes would cost, found out before they run: each place changed alone."""

from tersor.passes.analysis.result import Analysis, Outcome, SiteAnalysis
from tersor.passes.analysis.sensitivity import SCHEMES, analyze

__all__ = ["SCHEMES", "Analysis", "Outcome", "SiteAnalysis", "analyze"]
