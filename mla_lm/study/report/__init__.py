"""The report of a result: a page, its figures as SVG and PNG, Markdown and CSV."""

from mla_lm.study.report.write import write_report

__all__ = ["write_report"]
