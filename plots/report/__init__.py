"""The report: one self-contained HTML page of everything that a results folder holds."""
