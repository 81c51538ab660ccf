"""Figures of scaling laws fit for a paper, and one page that tells them, from plain trees."""

from swiftv2.report.scaling.checks import isoflop, residuals
from swiftv2.report.scaling.losses import loss_against_compute, loss_against_parameters, loss_against_tokens
from swiftv2.report.scaling.page import write_page
from swiftv2.report.scaling.style import save_figure
from swiftv2.report.scaling.widths import coordinates, transfer

__all__ = [
    "coordinates",
    "isoflop",
    "loss_against_compute",
    "loss_against_parameters",
    "loss_against_tokens",
    "residuals",
    "save_figure",
    "transfer",
    "write_page",
]
