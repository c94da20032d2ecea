"""The report: one self-contained HTML page that shows everything in a results folder."""
